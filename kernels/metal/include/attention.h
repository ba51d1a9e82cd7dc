// Attention of a block of query rows over tiles of keys with one online softmax: what flash_decode and flash_prefill
// share. FlashAttention (Dao et al. 2022, algorithm 1) with the head split over the SIMD-groups, because the output of
// a 512-wide head does not fit the registers of one.
//
// A threadgroup has D / 64 SIMD-groups and ROWS query rows of one KV head; row r is query r / G of head r % G, so all
// heads that share keys read them together. A SIMD-group owns 64 dims: 32 of the first half of the head and the 32
// that RoPE pairs with them in the second. For each tile of KEYS keys
//
//   1. every SIMD-group multiplies its dims of the keys with its dims of the queries, a part of every score;
//   2. barrier; each row's threads add the parts up, hide what the row may not see, and turn scores into weights;
//   3. barrier; every SIMD-group adds weights times its dims of the values to its dims of the output.
//
// Matrices are 8x8: a lane holds row matrix_row and columns 2 * pair, 2 * pair + 1. A sum over dims may take them in any
// order, so these columns of fragment f stand for dims run + 2f, run + 2f + 1 with run = first dim + 8 * pair: a lane
// reads 8 neighbours. One-vector caches use that what was read as key is the value, too, in the same registers.

// What is indexed in a loop stays in registers only if the loop is unrolled.
#define FLASH_UNROLL _Pragma("clang loop unroll(full)")

// A score that is hidden, and the log-sum-exp of a row that sees nothing.
constant constexpr float MASKED = -1e30f;

// Keys and values of one sequence and KV head; steps are in elements.
template <typename T>
struct KeyHead {
  const device T* keys;
  const device T* values;
  int64_t key_step;
  int64_t key_dim_step;
  int64_t value_step;
  int64_t value_dim_step;
};

// How keys follow from one-vector caches: key = RoPE(weight * vector), the first `pairs` pairs turned.
template <typename W>
struct KeyForm {
  const device W* weight;       // [D]
  const device float* cosines;  // [positions, pairs]
  const device float* sines;
  int pairs;
};

// Which keys the block's rows may see. Keys are counted from the first one stored, whose position is k_start.
struct Sight {
  int q_start;        // position of query 0
  int k_start;
  int first_visible;  // position
  int first_row;      // of this block
  int start;          // keys to look at
  int stop;
};

inline short matrix_row(uint lane) {
  return short(((lane >> 2) & 4) + ((lane >> 1) & 3));
}

inline short matrix_pair(uint lane) {
  return short(((lane >> 2) & 2) + (lane & 1));
}

inline void multiply_add(thread float2& sum, float2 a, float2 b) {
  simdgroup_matrix<float, 8, 8> left;
  simdgroup_matrix<float, 8, 8> right;
  simdgroup_matrix<float, 8, 8> result;
  reinterpret_cast<thread float2&>(left.thread_elements()) = a;
  reinterpret_cast<thread float2&>(right.thread_elements()) = b;
  reinterpret_cast<thread float2&>(result.thread_elements()) = sum;
  simdgroup_multiply_accumulate(result, left, right, result);
  sum = reinterpret_cast<thread float2&>(result.thread_elements());
}

// 8 neighbouring dims.
template <typename T>
inline void load_run(const device T* from, int64_t step, thread T* run) {
  if (step == 1) {
    const vec<T, 4> low = reinterpret_cast<const device vec<T, 4>*>(from)[0];
    const vec<T, 4> high = reinterpret_cast<const device vec<T, 4>*>(from)[1];
    FLASH_UNROLL
    for (short i = 0; i < 4; i++) {
      run[i] = low[i];
      run[i + 4] = high[i];
    }
  } else {
    FLASH_UNROLL
    for (short i = 0; i < 8; i++) {
      run[i] = from[i * step];
    }
  }
}

// This SIMD-group's dims of the block's queries, as right-hand matrices: queries[(f8 * 2 + half) * 4 + f] holds two rows
// of one dim. With ONE_VECTOR the dims that are not rotated carry the key's weight. Rows past the last repeat it.
template <typename T, typename Q, typename W, int D, int G, int ROWS, bool ONE_VECTOR>
inline void load_queries(
    const device T* q,
    int64_t head_step,
    int64_t query_step,
    int64_t dim_step,
    int first_row,
    int rows,
    KeyForm<W> form,
    uint simdgroup,
    uint lane,
    thread vec<Q, 2>* queries) {
  const short row = matrix_row(lane);
  const short pair = matrix_pair(lane);
  FLASH_UNROLL
  for (short block = 0; block < ROWS / 8; block++) {
    FLASH_UNROLL
    for (short e = 0; e < 2; e++) {
      const int r = min(first_row + block * 8 + 2 * pair + e, rows - 1);
      const device T* from = q + (r % G) * head_step + (r / G) * query_step;
      FLASH_UNROLL
      for (short i = 0; i < 8; i++) {
        const int in_half = int(simdgroup) * 32 + 8 * (row / 2) + 2 * (i % 4) + row % 2;
        const int dim = (i / 4) * (D / 2) + in_half;
        float value = float(from[dim * dim_step]);
        if (ONE_VECTOR && in_half >= form.pairs) {
          value *= float(form.weight[dim]);
        }
        queries[block * 8 + i][e] = Q(value);
      }
    }
  }
}

// The rotated dims of a key from its vector, in place: key[i] and key[i + 8] are a pair.
template <typename W, int D>
inline void rotate_run(thread float* key, KeyForm<W> form, int position, int run) {
  const device float* cosine = form.cosines + int64_t(position) * form.pairs + run;
  const device float* sine = form.sines + int64_t(position) * form.pairs + run;
  FLASH_UNROLL
  for (short i = 0; i < 8; i++) {
    const float c = cosine[i];
    const float s = sine[i];
    const float a = key[i] * float(form.weight[run + i]);
    const float b = key[i + 8] * float(form.weight[D / 2 + run + i]);
    key[i] = a * c - b * s;
    key[i + 8] = b * c + a * s;
  }
}

// Step 2. A row belongs to 32 * SIMDGROUPS / ROWS neighbouring threads; each keeps the row's peak and total.
template <int SIMDGROUPS, int G, int ROWS, int KEYS>
inline void weigh(
    const threadgroup float* parts,
    threadgroup float* weights,
    threadgroup float* shrink,
    Sight sight,
    int tile,
    float scale,
    uint simdgroup,
    uint lane,
    thread float& peak,
    thread float& total) {
  constexpr int STRIDE = KEYS + 4;
  constexpr int THREADS = 32 * SIMDGROUPS / ROWS;
  constexpr int EACH = KEYS / THREADS;
  static_assert(THREADS >= 1 && THREADS <= 32 && EACH >= 1, "a row's threads lie in one SIMD-group and all have keys");
  const int index = int(simdgroup) * 32 + int(lane);
  const int row = index / THREADS;
  const int newest = sight.q_start + (sight.first_row + row) / G;

  float scores[EACH];
  float highest = peak;
  FLASH_UNROLL
  for (short i = 0; i < EACH; i++) {
    const int key = index % THREADS + i * THREADS;
    const int position = sight.k_start + tile + key;
    float score = 0.0f;
    FLASH_UNROLL
    for (short s = 0; s < SIMDGROUPS; s++) {
      score += parts[(s * ROWS + row) * STRIDE + key];
    }
    const bool visible = position <= newest && position >= sight.first_visible && tile + key < sight.stop;
    scores[i] = visible ? score * scale : MASKED;
    highest = max(highest, scores[i]);
  }
  FLASH_UNROLL
  for (ushort step = THREADS / 2; step > 0; step /= 2) {
    highest = max(highest, simd_shuffle_xor(highest, step));
  }
  float sum = 0.0f;
  FLASH_UNROLL
  for (short i = 0; i < EACH; i++) {
    // Not exp of a difference alone: where nothing was seen yet, that of a hidden score would be 1.
    const float weight = scores[i] > 0.5f * MASKED ? fast::exp(scores[i] - highest) : 0.0f;
    weights[row * STRIDE + index % THREADS + i * THREADS] = weight;
    sum += weight;
  }
  FLASH_UNROLL
  for (ushort step = THREADS / 2; step > 0; step /= 2) {
    sum += simd_shuffle_xor(sum, step);
  }
  const float fade = fast::exp(peak - highest);
  if (index % THREADS == 0) {
    shrink[row] = fade;
  }
  total = total * fade + sum;
  peak = highest;
}

// All tiles of sight.start .. sight.stop. `out` gathers, for fragment (block, half, f), the sum of weights times values
// in out[(block * 2 + half) * 4 + f]; not yet divided by the row's total.
template <typename T, typename Q, typename W, int D, int G, int ROWS, int KEYS, bool ONE_VECTOR>
inline void attend_tiles(
    KeyHead<T> head,
    KeyForm<W> form,
    Sight sight,
    float scale,
    const thread vec<Q, 2>* queries,
    threadgroup float* parts,
    threadgroup float* weights,
    threadgroup float* shrink,
    uint simdgroup,
    uint lane,
    thread float2* out,
    thread float& peak,
    thread float& total) {
  constexpr int STRIDE = KEYS + 4;  // so that the lanes of a matrix fall into different banks
  const short row = matrix_row(lane);
  const short pair = matrix_pair(lane);
  const int run = int(simdgroup) * 32 + pair * 8;
  threadgroup float* part = parts + (int(simdgroup) * ROWS + 2 * pair) * STRIDE + row;

  for (int tile = sight.start; tile < sight.stop; tile += KEYS) {
    T values[KEYS / 8][16];
    FLASH_UNROLL
    for (short k = 0; k < KEYS / 8; k++) {
      // A tile's last keys may not exist; what stands in for them is hidden.
      const int at = min(tile + k * 8 + row, sight.stop - 1);
      const device T* from = head.keys + at * head.key_step + run * head.key_dim_step;
      T read[16];
      load_run<T>(from, head.key_dim_step, read);
      load_run<T>(from + (D / 2) * head.key_dim_step, head.key_dim_step, read + 8);
      float key[16];
      FLASH_UNROLL
      for (short i = 0; i < 16; i++) {
        key[i] = float(read[i]);
      }
      if (ONE_VECTOR) {
        FLASH_UNROLL
        for (short i = 0; i < 16; i++) {
          values[k][i] = read[i];
        }
        if (run < form.pairs) {
          rotate_run<W, D>(key, form, max(sight.k_start + at - sight.first_visible, 0), run);
        }
      } else {
        const device T* value = head.values + at * head.value_step + run * head.value_dim_step;
        load_run<T>(value, head.value_dim_step, values[k]);
        load_run<T>(value + (D / 2) * head.value_dim_step, head.value_dim_step, values[k] + 8);
      }
      FLASH_UNROLL
      for (short block = 0; block < ROWS / 8; block++) {
        float2 score = float2(0.0f, 0.0f);
        FLASH_UNROLL
        for (short i = 0; i < 8; i++) {
          const vec<Q, 2> query = queries[block * 8 + i];
          multiply_add(score, float2(key[2 * i], key[2 * i + 1]), float2(float(query[0]), float(query[1])));
        }
        part[block * 8 * STRIDE + k * 8] = score.x;
        part[(block * 8 + 1) * STRIDE + k * 8] = score.y;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // all parts are there
    weigh<D / 64, G, ROWS, KEYS>(parts, weights, shrink, sight, tile, scale, simdgroup, lane, peak, total);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // all weights are there, and the parts may be overwritten
    FLASH_UNROLL
    for (short block = 0; block < ROWS / 8; block++) {
      const float fade = shrink[block * 8 + row];
      FLASH_UNROLL
      for (short i = 0; i < 8; i++) {
        out[block * 8 + i] *= fade;
      }
      FLASH_UNROLL
      for (short k = 0; k < KEYS / 8; k++) {
        const threadgroup float* weight = weights + (block * 8 + row) * STRIDE + k * 8 + 2 * pair;
        FLASH_UNROLL
        for (short i = 0; i < 8; i++) {
          const float2 value = float2(float(values[k][2 * i]), float(values[k][2 * i + 1]));
          multiply_add(out[block * 8 + i], float2(weight[0], weight[1]), value);
        }
      }
    }
  }
}

// Divides by the totals and writes the block: out points at [G heads, L, D] of one KV head, lse at [G heads, L].
template <typename O, int D, int G, int ROWS>
inline void store_rows(
    const thread float2* sums,
    float peak,
    float total,
    int first_row,
    int rows,
    int L,
    threadgroup float* inverse,
    uint simdgroup,
    uint lane,
    device O* out,
    device float* lse) {
  constexpr int THREADS = 32 * (D / 64) / ROWS;
  const int index = int(simdgroup) * 32 + int(lane);
  const int mine = first_row + index / THREADS;
  if (index % THREADS == 0) {
    inverse[index / THREADS] = total > 0.0f ? 1.0f / total : 0.0f;
    if (mine < rows) {
      lse[(mine % G) * L + mine / G] = total > 0.0f ? peak + log(total) : MASKED;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const short row = matrix_row(lane);
  const int run = int(simdgroup) * 32 + matrix_pair(lane) * 8;
  FLASH_UNROLL
  for (short block = 0; block < ROWS / 8; block++) {
    const int r = first_row + block * 8 + row;
    if (r < rows) {
      const float factor = inverse[block * 8 + row];
      device O* to = out + (int64_t(r % G) * L + r / G) * D + run;
      FLASH_UNROLL
      for (short i = 0; i < 8; i++) {
        const float2 sum = sums[block * 8 + i];
        to[(i / 4) * (D / 2) + 2 * (i % 4)] = O(sum.x * factor);
        to[(i / 4) * (D / 2) + 2 * (i % 4) + 1] = O(sum.y * factor);
      }
    }
  }
}
