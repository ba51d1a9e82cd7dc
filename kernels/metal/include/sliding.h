// Attention of a few query rows over keys read straight into registers, in 8x8 simdgroup matrices. Shared by
// sliding_prefill.metal and sliding_decode.metal; which keys a row sees is theirs.
//
// The rows of a tile are 8 * RT (query, head) pairs of one KV head. RT simdgroups work on them, and each owns D / RT of
// the head's columns: it multiplies its columns of the queries with its columns of a key (a partial score), all add up
// each other's partial scores, and each sums its own columns of the values. So every byte of a key or value is read
// once for all rows, the sums of 8 * RT rows by D / RT columns fill 64 registers at D = 256 whatever RT, and neither
// keys nor values pass through threadgroup memory.
//
// A lane holds two neighbours of each 8x8 matrix, at (row_of(lane), column_of(lane)) and one column on. Apple does not
// document this; MLX's own attention relies on it (mlx/backend/metal/kernels/steel/attn/mma.h, get_coord).
//
// The order of a head's columns does not matter to a product, so it is chosen for the loads: a lane reads E neighbours
// at once, which belong to E different matrices. Within a block of 8 * E columns
//     queries, keys   matrix e, column c         is column E * c + e
//     values, sums    matrix e, columns 2j, 2j+1 are columns 2 * E * j + 2 * e and the next

#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>

using namespace metal;

namespace sliding {

// A masked score, and the peak of a row that has seen nothing. Finite, so that differences are never NaN.
#define SLIDING_MASKED (-1e30f)

// Before every loop that indexes a lane's own arrays: they are registers only if all their indices are constants.
#define SLIDING_UNROLL _Pragma("clang loop unroll(full)")

inline int row_of(uint lane) {
  return int(((lane / 4) & 4) + (lane / 2) % 4);
}

inline int column_of(uint lane) {
  return int(((lane / 4) & 2) * 2 + (lane % 2) * 2);
}

// Neighbouring columns that one lane reads at once.
template <int SLICE>
constexpr int run_length() {
  return SLICE >= 32 ? 4 : 2;
}

// sum += a * b
inline void multiply_add(thread float2& sum, float2 a, float2 b) {
  simdgroup_matrix<float, 8, 8> A;
  simdgroup_matrix<float, 8, 8> B;
  simdgroup_matrix<float, 8, 8> C;
  reinterpret_cast<thread float2&>(A.thread_elements()) = a;
  reinterpret_cast<thread float2&>(B.thread_elements()) = b;
  reinterpret_cast<thread float2&>(C.thread_elements()) = sum;
  simdgroup_multiply_accumulate(C, A, B, C);
  sum = reinterpret_cast<thread float2&>(C.thread_elements());
}

// Over the four lanes that hold one row of a matrix.
inline float row_max(float x) {
  x = max(x, simd_shuffle_xor(x, ushort(1)));
  return max(x, simd_shuffle_xor(x, ushort(8)));
}

inline float row_sum(float x) {
  x += simd_shuffle_xor(x, ushort(1));
  return x + simd_shuffle_xor(x, ushort(8));
}

// E numbers at `from`, or zeros where there is nothing to read. Without GUARD all are known to be there: the loads of a
// whole tile then stand in a row, with no branch between them.
template <typename T, int E, bool GUARD>
inline vec<T, E> read_run(const device T* from, bool there) {
  vec<T, E> run = vec<T, E>(T(0));
  if (!GUARD || there) {
    run = *reinterpret_cast<const device vec<T, E>*>(from);
  }
  return run;
}

// One block of one row tile's queries into `stash`: E matrices of 32 pairs, in the order in which lanes read them back.
// `query` is this lane's row at the block's first column.
template <typename T, int E>
inline void stash_queries(threadgroup vec<T, 2>* stash, const device T* query, bool there, uint lane) {
  const device T* from = query + E * column_of(lane);
  const vec<T, E> left = read_run<T, E, true>(from, there);
  const vec<T, E> right = read_run<T, E, true>(from + E, there);
  SLIDING_UNROLL
  for (int e = 0; e < E; e++) {
    stash[e * 32 + int(lane)] = vec<T, 2>(left[e], right[e]);
  }
}

template <typename T, int D, int SLICE, int RT, int KT, bool GUARD>
inline void partial_scores_of(
    thread float2* scores,
    const threadgroup vec<T, 2>* stash,
    const device T* keys,
    int at,
    int stop,
    uint lane) {
  constexpr int E = run_length<SLICE>();
  const int first = at + column_of(lane);
  const device T* from = keys + size_t(first) * D + E * row_of(lane);
  SLIDING_UNROLL
  for (int i = 0; i < RT * KT; i++) {
    scores[i] = float2(0.0f);
  }
  SLIDING_UNROLL
  for (int block = 0; block < SLICE / (8 * E); block++) {
    vec<T, E> left[KT];
    vec<T, E> right[KT];
    SLIDING_UNROLL
    for (int kt = 0; kt < KT; kt++) {
      const int key = 8 * kt;
      left[kt] = read_run<T, E, GUARD>(from + key * D + block * 8 * E, first + key < stop);
      right[kt] = read_run<T, E, GUARD>(from + (key + 1) * D + block * 8 * E, first + key + 1 < stop);
    }
    SLIDING_UNROLL
    for (int e = 0; e < E; e++) {
      SLIDING_UNROLL
      for (int rt = 0; rt < RT; rt++) {
        const vec<T, 2> pair = stash[(rt * (SLICE / 8) + block * E + e) * 32 + int(lane)];
        const float2 query = float2(float(pair[0]), float(pair[1]));
        SLIDING_UNROLL
        for (int kt = 0; kt < KT; kt++) {
          multiply_add(scores[rt * KT + kt], query, float2(float(left[kt][e]), float(right[kt][e])));
        }
      }
    }
  }
}

// scores[rt * KT + kt] = queries of row tile rt times keys at .. at + 8 * KT, over SLICE columns.
// `keys` is key 0 at the slice's first column, D numbers to the next; keys at or after `stop` are not read.
// `stash` holds the slice's queries, [RT][SLICE / 8][32].
template <typename T, int D, int SLICE, int RT, int KT>
inline void partial_scores(
    thread float2* scores,
    const threadgroup vec<T, 2>* stash,
    const device T* keys,
    int at,
    int stop,
    uint lane) {
  if (at + 8 * KT <= stop) {
    partial_scores_of<T, D, SLICE, RT, KT, false>(scores, stash, keys, at, stop, lane);
  } else {
    partial_scores_of<T, D, SLICE, RT, KT, true>(scores, stash, keys, at, stop, lane);
  }
}

// scores[i] = the sum over the RT simdgroups of shared[part][i]: whole scores from partial ones. RT * KT each.
template <int RT, int KT>
inline void gather_scores(thread float2* scores, const threadgroup float2* shared, uint lane) {
  SLIDING_UNROLL
  for (int i = 0; i < RT * KT; i++) {
    float2 sum = shared[i * 32 + int(lane)];
    SLIDING_UNROLL
    for (int part = 1; part < RT; part++) {
      sum += shared[(part * RT * KT + i) * 32 + int(lane)];
    }
    scores[i] = sum;
  }
}

// Online softmax (Milakov and Gimelshein 2018), base 2: `scale` includes log2(e). Turns scores into weights relative to
// the new peaks, and brings totals (this lane's share) and sums, [RT][SLICE / 8], to them. Row tile rt of this lane
// sees places from[rt] <= place < to[rt]; the two places of matrix kt are places[2 * kt] and places[2 * kt + 1].
template <int SLICE, int RT, int KT>
inline void soften(
    thread float2* scores,
    thread float2* sums,
    thread float* peaks,
    thread float* totals,
    const thread int* from,
    const thread int* to,
    const thread int* places,
    float scale) {
  SLIDING_UNROLL
  for (int rt = 0; rt < RT; rt++) {
    float peak = SLIDING_MASKED;
    SLIDING_UNROLL
    for (int kt = 0; kt < KT; kt++) {
      SLIDING_UNROLL
      for (int j = 0; j < 2; j++) {
        const int place = places[2 * kt + j];
        const bool seen = place >= from[rt] && place < to[rt];
        const float score = seen ? scores[rt * KT + kt][j] * scale : SLIDING_MASKED;
        scores[rt * KT + kt][j] = score;
        peak = max(peak, score);
      }
    }
    peak = max(peaks[rt], row_max(peak));
    const float shrink = fast::exp2(peaks[rt] - peak);
    peaks[rt] = peak;
    float total = totals[rt] * shrink;
    SLIDING_UNROLL
    for (int kt = 0; kt < KT; kt++) {
      SLIDING_UNROLL
      for (int j = 0; j < 2; j++) {
        const float score = scores[rt * KT + kt][j];
        // In a tile of which a row sees nothing, score - peak may be 0.
        const float weight = score > SLIDING_MASKED ? fast::exp2(score - peak) : 0.0f;
        scores[rt * KT + kt][j] = weight;
        total += weight;
      }
    }
    totals[rt] = total;
    SLIDING_UNROLL
    for (int f = 0; f < SLICE / 8; f++) {
      sums[rt * (SLICE / 8) + f] *= shrink;
    }
  }
}

template <typename T, int D, int SLICE, int RT, int KT, bool GUARD>
inline void add_values_of(
    thread float2* sums, const thread float2* weights, const device T* values, int at, int stop, uint lane) {
  constexpr int E = run_length<SLICE>();
  const int first = at + row_of(lane);
  const device T* from = values + size_t(first) * D + E * column_of(lane);
  SLIDING_UNROLL
  for (int block = 0; block < SLICE / (8 * E); block++) {
    SLIDING_UNROLL
    for (int kt = 0; kt < KT; kt++) {
      const device T* row = from + 8 * kt * D + block * 8 * E;
      vec<T, E> halves[2];
      halves[0] = read_run<T, E, GUARD>(row, first + 8 * kt < stop);
      halves[1] = read_run<T, E, GUARD>(row + E, first + 8 * kt < stop);
      SLIDING_UNROLL
      for (int e = 0; e < E; e++) {
        const vec<T, E> half_run = halves[2 * e / E];
        const float2 value = float2(float(half_run[2 * e % E]), float(half_run[2 * e % E + 1]));
        SLIDING_UNROLL
        for (int rt = 0; rt < RT; rt++) {
          multiply_add(sums[rt * (SLICE / 8) + block * E + e], weights[rt * KT + kt], value);
        }
      }
    }
  }
}

// sums[rt][f] += weights of row tile rt times values at .. at + 8 * KT, over SLICE columns. Arguments as above.
template <typename T, int D, int SLICE, int RT, int KT>
inline void add_values(
    thread float2* sums, const thread float2* weights, const device T* values, int at, int stop, uint lane) {
  if (at + 8 * KT <= stop) {
    add_values_of<T, D, SLICE, RT, KT, false>(sums, weights, values, at, stop, lane);
  } else {
    add_values_of<T, D, SLICE, RT, KT, true>(sums, weights, values, at, stop, lane);
  }
}

// The two columns that this lane holds of matrix f of a slice.
template <int SLICE>
inline int column_of_sum(int f, uint lane) {
  constexpr int E = run_length<SLICE>();
  return (f / E) * 8 * E + E * column_of(lane) + 2 * (f % E);
}

} // namespace sliding
