// Attention of few query rows over a compressed past, one split of it per threadgroup. Runs once a global layer and
// decoded token; the launcher and the shapes are in kernels/turboquant_attention.py.
//
// Below 6 bits per coordinate this is bound by arithmetic, not by bytes, so that every code is decoded once, straight
// into the registers of an 8x8 SIMD-group matrix, and multiplied with all query rows of its KV head. The codes of a row
// are stored in lane-column order for that purpose: a lane reads one run per row and SIMD-group.
//
// A SIMD-group owns D / GROUPS coordinates; TILE positions are taken at a time:
//   1. decode the keys, multiply with the queries, leave the partial scores in threadgroup memory
//   2. a SIMD-group per query row, a lane per position: sum the partial scores, online softmax in float, weights
//   3. weights times values: the decoded keys themselves (one vector), or rows of their own, decoded now. Where a tile
//      has a negligible share of every row's softmax, this step is left out and value codes are not even read.
//
//   q [B, H, L, D] with scale and gain in it; keys [B, H_kv, capacity, words], key_scales [B, H_kv, capacity]
//   OTHER  NONE: the key row is the value row.  VALUES: other is a value row.  ROTARY: one vector, and other is a
//          second key row of OTHER_D coordinates, whose queries are in q_rotary [B, H, L, OTHER_D].
//   span [4]: start, end, positions per split, query rows R = H / H_kv * L;  first [B]: padding, if FIRST;
//   gain [1] of the values -> out [splits, B, H, L, D], lse [splits, B, H, L]
//   grid (splits * 32 * GROUPS) x H_kv x (B * ceil(R / ROWS))

enum { NONE, VALUES, ROTARY };
constexpr int TILE = 32;  // a lane each
constexpr int BLOCKS = TILE / 8;
constexpr int ROWS = 8 * ROW_BLOCKS;
constexpr int F = D / GROUPS / 8;  // matrices side by side that a SIMD-group owns
constexpr int OTHER_F = OTHER_D / GROUPS / 8;
constexpr int WORDS = (KV * D + 63) / 64;
constexpr int OTHER_WORDS = (OTHER_KV * OTHER_D + 63) / 64;
// Rows of scores and weights lie 4 words apart from a multiple of 32: lanes that hold a column of a matrix then write
// to different banks.
constexpr int STRIDE = TILE + 4;
// Share of a row's running sum below which a tile's values are left out. At most one such error per tile: 1e-4 of the
// output at a hundred tiles per split. The weights themselves stay in the sum.
constexpr float NEGLIGIBLE = 1e-6f;
constexpr float MASKED = -1e30f;

threadgroup half2 table[1 << L];
threadgroup half2 other_own[OWN_TABLE ? 1 << OTHER_L : 1];
threadgroup float partial[GROUPS * ROWS * STRIDE];
threadgroup T weights[ROWS * STRIDE];
threadgroup float shrink[ROWS];
threadgroup float share[ROWS];
threadgroup float norm[ROWS];

const uint lane = thread_index_in_simdgroup;
const uint group = simdgroup_index_in_threadgroup;
const uint split = threadgroup_position_in_grid.x;
const uint row_groups = (uint(span[3]) + ROWS - 1) / ROWS;
const uint batch = threadgroup_position_in_grid.z / row_groups;
const uint row0 = threadgroup_position_in_grid.z % row_groups * ROWS;
const uint rows = min(uint(span[3]) - row0, uint(ROWS));
const ulong head = ulong(batch) * threadgroups_per_grid.y + threadgroup_position_in_grid.y;
const ulong capacity = ulong(keys_shape[2]);
const ulong query0 = head * ulong(span[3]) + row0;  // the first query row, counted over batch and heads

// The lane's place in an 8x8 matrix: row fm, columns fn and fn + 1.
const uint quad = lane / 4;
const uint fm = (quad & 4) + (lane / 2) % 4;
const uint fn = (quad & 2) * 2 + (lane % 2) * 2;

turboquant_load_table<L>(key_table, table, thread_index_in_threadgroup, 32 * GROUPS);
if (OWN_TABLE) {
  turboquant_load_table<OTHER_L>(other_table, other_own, thread_index_in_threadgroup, 32 * GROUPS);
}
const threadgroup half2* other_entries = OWN_TABLE ? other_own : table;

// Queries, transposed: coordinates down, rows across. Rows beyond the last are zero.
simdgroup_matrix<T, 8, 8> queries[ROW_BLOCKS][F];
simdgroup_matrix<T, 8, 8> turned[ROW_BLOCKS][OTHER == ROTARY ? OTHER_F : 1];
TURBOQUANT_UNROLL
for (int r = 0; r < ROW_BLOCKS; r++) {
  TURBOQUANT_UNROLL
  for (uint c = 0; c < 2; c++) {
    const uint row = 8 * r + fn + c;
    TURBOQUANT_UNROLL
    for (int f = 0; f < F; f++) {
      const uint d = 8 * (group * F + f) + fm;
      queries[r][f].thread_elements()[c] = row < rows ? q[(query0 + row) * D + d] : T(0);
    }
    if (OTHER == ROTARY) {
      TURBOQUANT_UNROLL
      for (int f = 0; f < OTHER_F; f++) {
        const uint d = 8 * (group * OTHER_F + f) + fm;
        turned[r][f].thread_elements()[c] = row < rows ? q_rotary[(query0 + row) * OTHER_D + d] : T(0);
      }
    }
  }
}

simdgroup_matrix<float, 8, 8> sums[ROW_BLOCKS][F];
TURBOQUANT_UNROLL
for (int r = 0; r < ROW_BLOCKS; r++) {
  TURBOQUANT_UNROLL
  for (int f = 0; f < F; f++) {
    sums[r][f] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
}
// Of the rows whose softmax this SIMD-group keeps: group, group + GROUPS, ...
float peak[ROWS / GROUPS];
float total[ROWS / GROUPS];
TURBOQUANT_UNROLL
for (int i = 0; i < ROWS / GROUPS; i++) {
  peak[i] = MASKED;
  total[i] = 0.0f;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const int lowest = span[0] + int(split) * span[2];
const int end = min(lowest + span[2], span[1]);
for (int tile = FIRST ? max(lowest, int(first[batch])) : lowest; tile < end; tile += TILE) {
  simdgroup_matrix<T, 8, 8> decoded[BLOCKS][F];
  TURBOQUANT_UNROLL
  for (int b = 0; b < BLOCKS; b++) {
    // Past the end the last row once more: nothing else is read, and its weight is zero.
    const ulong position = head * capacity + ulong(min(tile + 8 * b + int(fm), end - 1));
    uint bits[turboquant_run<KV, L, F>::words];
    turboquant_load_run<KV, L, F>(keys + position * WORDS, turboquant_step(D, group * F, fn / 2), bits);
    simdgroup_matrix<float, 8, 8> scores[ROW_BLOCKS];
    TURBOQUANT_UNROLL
    for (int r = 0; r < ROW_BLOCKS; r++) {
      scores[r] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    TURBOQUANT_UNROLL
    for (int f = 0; f < F; f++) {
      const half2 pair = table[turboquant_run_window<KV, L>(bits, f)];
      decoded[b][f].thread_elements()[0] = T(pair.x);
      decoded[b][f].thread_elements()[1] = T(pair.y);
      TURBOQUANT_UNROLL
      for (int r = 0; r < ROW_BLOCKS; r++) {
        simdgroup_multiply_accumulate(scores[r], decoded[b][f], queries[r][f], scores[r]);
      }
    }
    if (OTHER == ROTARY) {
      uint other_bits[turboquant_run<OTHER_KV, OTHER_L, OTHER_F>::words];
      turboquant_load_run<OTHER_KV, OTHER_L, OTHER_F>(
          other + position * OTHER_WORDS, turboquant_step(OTHER_D, group * OTHER_F, fn / 2), other_bits);
      const float scale = OTHER_SCALED ? float(other_scales[position]) : 1.0f;
      TURBOQUANT_UNROLL
      for (int f = 0; f < OTHER_F; f++) {
        const half2 pair = other_entries[turboquant_run_window<OTHER_KV, OTHER_L>(other_bits, f)];
        simdgroup_matrix<T, 8, 8> key;
        key.thread_elements()[0] = T(scale * float(pair.x));
        key.thread_elements()[1] = T(scale * float(pair.y));
        TURBOQUANT_UNROLL
        for (int r = 0; r < ROW_BLOCKS; r++) {
          simdgroup_multiply_accumulate(scores[r], key, turned[r][f], scores[r]);
        }
      }
    }
    TURBOQUANT_UNROLL
    for (int r = 0; r < ROW_BLOCKS; r++) {
      TURBOQUANT_UNROLL
      for (uint c = 0; c < 2; c++) {
        const uint row = group * ROWS + 8 * r + fn + c;
        partial[row * STRIDE + 8 * b + fm] = scores[r].thread_elements()[c];
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const bool seen = tile + int(lane) < end;
  const ulong position = head * capacity + ulong(min(tile + int(lane), end - 1));
  const float key_scale = KEY_SCALED ? float(key_scales[position]) : 1.0f;
  const float value_scale = OTHER == VALUES && OTHER_SCALED ? float(other_scales[position]) : 1.0f;
  TURBOQUANT_UNROLL
  for (int i = 0; i < ROWS / GROUPS; i++) {
    const uint row = group + i * GROUPS;
    float score = 0.0f;
    for (uint g = 0; g < GROUPS; g++) {
      score += partial[(g * ROWS + row) * STRIDE + lane];
    }
    score = seen ? score * key_scale : MASKED;
    const float highest = max(peak[i], simd_max(score));
    const float weight = exp(score - highest);  // 0 for what is not seen: every tile has a position that is
    const float sum = simd_sum(weight);
    const float factor = exp(peak[i] - highest);
    peak[i] = highest;
    total[i] = total[i] * factor + sum;
    weights[row * STRIDE + lane] = T(weight * value_scale);
    if (lane == 0) {
      shrink[row] = factor;
      share[row] = row < rows ? sum / total[i] : 0.0f;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  TURBOQUANT_UNROLL
  for (int r = 0; r < ROW_BLOCKS; r++) {
    const float factor = shrink[8 * r + fm];
    TURBOQUANT_UNROLL
    for (int f = 0; f < F; f++) {
      sums[r][f].thread_elements()[0] *= factor;
      sums[r][f].thread_elements()[1] *= factor;
    }
  }
  // The same for all SIMD-groups, as all see the same shares.
  if (simd_max(lane < ROWS ? share[lane] : 0.0f) < NEGLIGIBLE) {
    continue;
  }
  TURBOQUANT_UNROLL
  for (int b = 0; b < BLOCKS; b++) {
    if (OTHER == VALUES) {
      const ulong stored = head * capacity + ulong(min(tile + 8 * b + int(fm), end - 1));
      uint bits[turboquant_run<OTHER_KV, OTHER_L, F>::words];
      turboquant_load_run<OTHER_KV, OTHER_L, F>(
          other + stored * OTHER_WORDS, turboquant_step(D, group * F, fn / 2), bits);
      TURBOQUANT_UNROLL
      for (int f = 0; f < F; f++) {
        const half2 pair = other_entries[turboquant_run_window<OTHER_KV, OTHER_L>(bits, f)];
        decoded[b][f].thread_elements()[0] = T(pair.x);
        decoded[b][f].thread_elements()[1] = T(pair.y);
      }
    }
    TURBOQUANT_UNROLL
    for (int r = 0; r < ROW_BLOCKS; r++) {
      simdgroup_matrix<T, 8, 8> weight;
      TURBOQUANT_UNROLL
      for (uint c = 0; c < 2; c++) {
        weight.thread_elements()[c] = weights[(8 * r + fm) * STRIDE + 8 * b + fn + c];
      }
      TURBOQUANT_UNROLL
      for (int f = 0; f < F; f++) {
        simdgroup_multiply_accumulate(sums[r][f], weight, decoded[b][f], sums[r][f]);
      }
    }
  }
}

const ulong queries_in_all = ulong(threadgroups_per_grid.z / row_groups) * threadgroups_per_grid.y * ulong(span[3]);
const ulong out0 = ulong(split) * queries_in_all + query0;
TURBOQUANT_UNROLL
for (int i = 0; i < ROWS / GROUPS; i++) {
  const uint row = group + i * GROUPS;
  if (lane == 0) {
    norm[row] = total[i] > 0.0f ? gain[0] / total[i] : 0.0f;
    if (row < rows) {
      lse[out0 + row] = total[i] > 0.0f ? peak[i] + log(total[i]) : MASKED;
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
TURBOQUANT_UNROLL
for (int r = 0; r < ROW_BLOCKS; r++) {
  const uint row = 8 * r + fm;
  if (row < rows) {
    TURBOQUANT_UNROLL
    for (int f = 0; f < F; f++) {
      TURBOQUANT_UNROLL
      for (uint c = 0; c < 2; c++) {
        out[(out0 + row) * D + 8 * (group * F + f) + fn + c] = sums[r][f].thread_elements()[c] * norm[row];
      }
    }
  }
}
