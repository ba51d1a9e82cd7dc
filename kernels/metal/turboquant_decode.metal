// Rows [span.start, span.start + span.n) of a buffer of codes -> rotated coordinates. The launcher and the shapes are in
// kernels/turboquant_decode.py. A threadgroup decodes ROWS rows; a thread one pair of coordinates at a time, in the
// order in which they are stored, so that a SIMD-group writes one contiguous run.
//
//   codes [B, H, capacity, WORDS], scales [B, H, capacity] (unused unless SCALED), codebook [2^L, 2], span [2]: start, n
//   grid  threads x ceil(n / ROWS) x B*H

threadgroup half2 table[1 << L];

const uint lane = thread_position_in_threadgroup.x;
const uint threads = threads_per_threadgroup.x;
turboquant_load_table<L>(codebook, table, lane, threads);
threadgroup_barrier(mem_flags::mem_threadgroup);

const uint start = uint(span[0]);
const uint n = uint(span[1]);
const uint capacity = uint(codes_shape[2]);
const uint head = threadgroup_position_in_grid.z;
const uint first = threadgroup_position_in_grid.y * uint(ROWS);
const uint last = min(first + uint(ROWS), n);

for (uint i = first * uint(D / 2) + lane; i < last * uint(D / 2); i += threads) {
  const uint row = i / uint(D / 2);
  const uint pair = i % uint(D / 2);
  const ulong stored = ulong(head) * capacity + start + row;
  const uint step = turboquant_step(D, pair / 4, pair % 4);
  float2 value = float2(turboquant_pair<KV, L>(codes + stored * WORDS, step, table)) * gain[0];
  if (SCALED) {
    value *= float(scales[stored]);
  }
  const ulong at = (ulong(head) * n + row) * D + 2 * pair;
  out[at] = static_cast<T>(value.x);
  out[at + 1] = static_cast<T>(value.y);
}
