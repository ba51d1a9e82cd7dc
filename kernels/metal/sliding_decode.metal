// Windowed attention of a few queries over keys in storage order, such as a ring: one threadgroup answers 8 * RT rows,
// which are (query, head) pairs of one KV head. KS groups of RT simdgroups each take every KS-th tile of 8 * KT slots,
// and their results are merged at the end. A slot is read once for all rows, and only if it is used.
//
//   q [B, H, L, D]; keys, values [B, H_kv, capacity, D]
//   start = (newest position, its slot, slots used, window): slot s < used holds position newest - (its slot - s) mod
//   capacity, and query i stands at newest - L + 1 + i; scale includes log2(e)
//   first [B]: the row's first visible position, if PADDED
//   out [B, H, L, D]
//   grid (32 * RT * KS * tiles, H_kv, B), threadgroup (32 * RT * KS, 1, 1)

constexpr int SLICE = D / RT;
constexpr int F = SLICE / 8;
constexpr int E = sliding::run_length<SLICE>();
constexpr int AT_ONCE = 4;  // matrices per simdgroup that are merged at a time
constexpr int SCORES = RT > 1 ? RT * KT : 0;
threadgroup vec<T, 2> queries[RT * RT * F * 32];
threadgroup float2 shared_sums[KS * RT * (SCORES > AT_ONCE ? SCORES : AT_ONCE) * 32];
threadgroup float2 shared_state[KS * RT * 8];

const uint lane = thread_index_in_simdgroup;
const int part = int(simdgroup_index_in_threadgroup) % RT;
const int group = int(simdgroup_index_in_threadgroup) / RT;
const int tile = int(threadgroup_position_in_grid.x);
const int kv_head = int(threadgroup_position_in_grid.y);
const int batch = int(threadgroup_position_in_grid.z);
const int kv_heads = keys_shape[1];
const int capacity = keys_shape[2];
const int L = q_shape[2];
const int newest = start[0];
const int newest_slot = start[1];
const int used = start[2];
const int window = start[3];

// Row by row: where it lies in q and out, and which positions it sees.
size_t offsets[RT];
bool real[RT];
int from[RT];
int to[RT];
SLIDING_UNROLL
for (int rt = 0; rt < RT; rt++) {
  const int row = (tile * RT + rt) * 8 + sliding::row_of(lane);
  const int i = row / G;
  real[rt] = i < L;
  offsets[rt] = (size_t((batch * kv_heads + kv_head) * G + row % G) * L + i) * D + part * SLICE;
  to[rt] = newest - L + 2 + i;
  from[rt] = to[rt] - window;
  if (PADDED) {
    from[rt] = max(from[rt], first[batch]);
  }
}

threadgroup vec<T, 2>* stash = queries + part * RT * F * 32;
SLIDING_UNROLL
for (int rt = 0; rt < RT; rt++) {
  for (int block = group; block < F / E; block += KS) {
    sliding::stash_queries<T, E>(
        stash + (rt * F + block * E) * 32, q + offsets[rt] + block * 8 * E, real[rt], lane);
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

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

const size_t head = size_t(batch * kv_heads + kv_head) * capacity * D + part * SLICE;
for (int begin = 0; begin < used; begin += 8 * KT * KS) {
  const int at = begin + 8 * KT * group;
  float2 scores[RT * KT];
  sliding::partial_scores<T, D, SLICE, RT, KT>(scores, stash, keys + head, at, used, lane);
  if (RT > 1) {
    threadgroup float2* mine = shared_sums + group * RT * RT * KT * 32;
    SLIDING_UNROLL
    for (int i = 0; i < RT * KT; i++) {
      mine[(part * RT * KT + i) * 32 + int(lane)] = scores[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sliding::gather_scores<RT, KT>(scores, mine, lane);
  }
  int places[2 * KT];
  SLIDING_UNROLL
  for (int kt = 0; kt < KT; kt++) {
    SLIDING_UNROLL
    for (int j = 0; j < 2; j++) {
      const int slot = at + 8 * kt + sliding::column_of(lane) + j;
      const int back = newest_slot - slot;
      // An unused slot stands in the future of every row.
      places[2 * kt + j] = slot < used ? newest - (back < 0 ? back + capacity : back) : newest + 1;
    }
  }
  sliding::soften<SLICE, RT, KT>(scores, sums, peaks, totals, from, to, places, scale);
  sliding::add_values<T, D, SLICE, RT, KT>(sums, scores, values + head, at, used, lane);
  if (RT > 1) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// Merge: peak and total of every group, then the sums relative to the common peak. All simdgroups of a group have the
// same peaks and totals.
SLIDING_UNROLL
for (int rt = 0; rt < RT; rt++) {
  totals[rt] = sliding::row_sum(totals[rt]);
  if (part == 0 && sliding::column_of(lane) == 0) {
    shared_state[(group * RT + rt) * 8 + sliding::row_of(lane)] = float2(peaks[rt], totals[rt]);
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
SLIDING_UNROLL
for (int rt = 0; rt < RT; rt++) {
  const threadgroup float2* states = shared_state + rt * 8 + sliding::row_of(lane);
  float peak = SLIDING_MASKED;
  for (int g = 0; g < KS; g++) {
    peak = max(peak, states[g * RT * 8].x);
  }
  float total = 0.0f;
  for (int g = 0; g < KS; g++) {
    total += states[g * RT * 8].y * fast::exp2(states[g * RT * 8].x - peak);
  }
  const float norm = total > 0.0f ? fast::exp2(peaks[rt] - peak) / total : 0.0f;
  SLIDING_UNROLL
  for (int f = 0; f < F; f++) {
    sums[rt * F + f] *= norm;
  }
}
SLIDING_UNROLL
for (int begin = 0; begin < RT * F; begin += AT_ONCE) {
  threadgroup float2* mine = shared_sums + (group * RT + part) * AT_ONCE * 32;
  SLIDING_UNROLL
  for (int m = 0; m < AT_ONCE; m++) {
    mine[m * 32 + int(lane)] = sums[begin + m];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int m = group; m < AT_ONCE; m += KS) {
    float2 sum = float2(0.0f);
    for (int g = 0; g < KS; g++) {
      sum += shared_sums[((g * RT + part) * AT_ONCE + m) * 32 + int(lane)];
    }
    const int rt = (begin + m) / F;
    if (real[rt]) {
      const size_t column = offsets[rt] + sliding::column_of_sum<SLICE>((begin + m) % F, lane);
      out[column] = static_cast<T>(sum.x);
      out[column + 1] = static_cast<T>(sum.y);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
