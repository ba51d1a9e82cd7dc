// Joins S partials of attention by their log-sum-exp. The launcher and the shapes are in kernels/merge_partials.py.
// Runs once a layer where attention was split; a thread owns one coordinate of one row and reads each partial once.
//
//   outs [S, rows, D], lses [S, rows], both float -> out [rows, D], lse [rows]
//   grid D x rows

const uint d = thread_position_in_grid.x;
const uint row = thread_position_in_grid.y;
const uint D = threads_per_grid.x;
const uint rows = threads_per_grid.y;
const uint S = uint(outs_shape[0]);

// Against the largest, which is finite even if every segment saw nothing: no weight overflows and at least one is 1.
float peak = lses[row];
for (uint s = 1; s < S; s++) {
  peak = max(peak, lses[s * rows + row]);
}
float total = 0.0f;
float sum = 0.0f;
for (uint s = 0; s < S; s++) {
  const float weight = exp(lses[s * rows + row] - peak);
  total += weight;
  sum += weight * outs[(ulong(s) * rows + row) * D + d];
}
out[ulong(row) * D + d] = sum / total;
if (d == 0) {
  lse[row] = peak + log(total);
}
