// Windowed attention of many queries: one threadgroup answers 8 * RT rows, which are (query, head) pairs of one KV head
// in order of position, so that few positions share a tile and tiles of keys outside their windows are never touched.
//
//   q [B, H, L, D]; keys, values [B, H_kv, T, D] in order of position
//   start = (position of query 0, position of key 0, window); scale includes log2(e)
//   first [B]: the row's first visible position, if PADDED; reach [B, L]: one past the last position a query sees, if
//   BLOCKS (images), else its own position + 1
//   out [B, H, L, D]
//   grid (32 * RT * tiles, H_kv, B), threadgroup (32 * RT, 1, 1)

constexpr int SLICE = D / RT;
constexpr int F = SLICE / 8;
constexpr int E = sliding::run_length<SLICE>();
threadgroup vec<T, 2> queries[RT * RT * F * 32];
threadgroup float2 shared_scores[RT * RT * KT * 32];

const uint lane = thread_index_in_simdgroup;
const int part = int(simdgroup_index_in_threadgroup);
const int tile = int(threadgroup_position_in_grid.x);
const int kv_head = int(threadgroup_position_in_grid.y);
const int batch = int(threadgroup_position_in_grid.z);
const int kv_heads = keys_shape[1];
const int L = q_shape[2];
const int length = keys_shape[2];
const int q_start = start[0];
const int k_start = start[1];
const int window = start[2];

// Row by row: where it lies in q and out, and which keys it sees, counted from key 0.
size_t offsets[RT];
bool real[RT];
int from[RT];
int to[RT];
int lowest = length;
int highest = 0;
SLIDING_UNROLL
for (int rt = 0; rt < RT; rt++) {
  const int row = (tile * RT + rt) * 8 + sliding::row_of(lane);
  const int i = row / G;
  real[rt] = i < L;
  offsets[rt] = (size_t((batch * kv_heads + kv_head) * G + row % G) * L + i) * D + part * SLICE;
  from[rt] = length;
  to[rt] = 0;
  if (real[rt]) {
    from[rt] = max(q_start + i - window + 1 - k_start, 0);
    to[rt] = q_start + i + 1 - k_start;
    if (PADDED) {
      from[rt] = max(from[rt], first[batch] - k_start);
    }
    if (BLOCKS) {
      to[rt] = min(reach[batch * L + i] - k_start, length);
    }
  }
  lowest = min(lowest, from[rt]);
  highest = max(highest, to[rt]);
}
lowest = simd_min(lowest);
highest = simd_max(highest);

// A lane reads back what it wrote itself, so no barrier: this is its memory for what registers cannot hold.
threadgroup vec<T, 2>* stash = queries + part * RT * F * 32;
SLIDING_UNROLL
for (int rt = 0; rt < RT; rt++) {
  for (int block = 0; block < F / E; block++) {
    sliding::stash_queries<T, E>(
        stash + (rt * F + block * E) * 32, q + offsets[rt] + block * 8 * E, real[rt], lane);
  }
}

float2 sums[RT * F];
float peaks[RT];
float totals[RT];
SLIDING_UNROLL
for (int rt = 0; rt < RT; rt++) {
  peaks[rt] = SLIDING_MASKED;
  totals[rt] = 0.0f;
}
SLIDING_UNROLL
for (int f = 0; f < RT * F; f++) {
  sums[f] = float2(0.0f);
}

const size_t head = size_t(batch * kv_heads + kv_head) * length * D + part * SLICE;
for (int at = lowest; at < highest; at += 8 * KT) {
  float2 scores[RT * KT];
  sliding::partial_scores<T, D, SLICE, RT, KT>(scores, stash, keys + head, at, highest, lane);
  if (RT > 1) {
    SLIDING_UNROLL
    for (int i = 0; i < RT * KT; i++) {
      shared_scores[(part * RT * KT + i) * 32 + int(lane)] = scores[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sliding::gather_scores<RT, KT>(scores, shared_scores, lane);
  }
  int places[2 * KT];
  SLIDING_UNROLL
  for (int kt = 0; kt < KT; kt++) {
    places[2 * kt] = at + 8 * kt + sliding::column_of(lane);
    places[2 * kt + 1] = places[2 * kt] + 1;
  }
  sliding::soften<SLICE, RT, KT>(scores, sums, peaks, totals, from, to, places, scale);
  sliding::add_values<T, D, SLICE, RT, KT>(sums, scores, values + head, at, highest, lane);
  if (RT > 1) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

SLIDING_UNROLL
for (int rt = 0; rt < RT; rt++) {
  const float total = sliding::row_sum(totals[rt]);
  const float norm = total > 0.0f ? 1.0f / total : 0.0f;
  if (real[rt]) {
    SLIDING_UNROLL
    for (int f = 0; f < F; f++) {
      const float2 sum = sums[rt * F + f] * norm;
      const size_t column = offsets[rt] + sliding::column_of_sum<SLICE>(f, lane);
      out[column] = static_cast<T>(sum.x);
      out[column + 1] = static_cast<T>(sum.y);
    }
  }
}
