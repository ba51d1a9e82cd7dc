// One row per threadgroup: scale, signs, Hadamard transform, then the codes that come closest. The launcher and the shapes
// are in kernels/turboquant.py, the format in include/turboquant.h.
//
//   x [rows, D], signs [D], codebook [2^L, 2] -> codes [rows, WORDS], scales [rows] (1 if UNIT)
//   grid  THREADS x rows
//
// Trellis (L > KV): Viterbi's search. A thread owns 1024 / THREADS successive table entries, held in registers, for the
// whole row. Entries that share their high L-KV bits, the state they leave, lie in successive lanes of one SIMD-group,
// so the best way into a state is a shuffle reduction, and its low KV bits are all the traceback needs.

constexpr uint STEPS = D / 2;
constexpr uint STATES = 1u << (L - KV);
constexpr uint ENTRIES = 1u << L;
constexpr bool TRELLIS = L > KV;
constexpr uint OWN = TRELLIS ? ENTRIES / THREADS : 1;
constexpr uint GROUP = TRELLIS ? (1u << KV) / OWN : 1;  // lanes whose entries leave one state
constexpr float FAR = 1e30f;

threadgroup float row[D];
threadgroup float sums[THREADS / 32];
threadgroup half2 table[TRELLIS ? 1 : ENTRIES];
threadgroup float best[2 * STATES];                     // cost of the best path into each state; steps alternate
threadgroup uchar came[TRELLIS ? STEPS * STATES : 1];   // low KV bits of the entry by which it came
threadgroup uchar fresh[STEPS];                         // new bits of each step

const uint lane = thread_position_in_threadgroup.x;
const uint r = threadgroup_position_in_grid.y;

// Scale.
float square = 0.0f;
for (uint i = lane; i < uint(D); i += THREADS) {
  const float value = float(x[ulong(r) * D + i]);
  row[i] = value;
  square += value * value;
}
half scale = half(1.0f);
if (!UNIT) {
  square = simd_sum(square);
  if (thread_index_in_simdgroup == 0) {
    sums[simdgroup_index_in_threadgroup] = square;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  square = 0.0f;
  for (uint i = 0; i < uint(THREADS / 32); i++) {
    square += sums[i];
  }
  scale = half(min(sqrt(square / float(D)), 65504.0f));
}
if (lane == 0) {
  scales[r] = scale;
}

// Rotation.
const float inverse = float(scale) > 0.0f ? 1.0f / float(scale) : 0.0f;
for (uint i = lane; i < uint(D); i += THREADS) {
  row[i] *= inverse * signs[i];
}
turboquant_hadamard<D>(row, lane, THREADS);
const float unitary = rsqrt(float(D));

if (TRELLIS) {
  const uint entry = lane * OWN;
  float2 own[OWN];
  for (uint i = 0; i < OWN; i++) {
    own[i] = float2(float(codebook[2 * (entry + i)]), float(codebook[2 * (entry + i) + 1]));
  }
  if (lane < STATES) {
    best[lane] = lane == 0 ? 0.0f : FAR;
  }
  for (uint t = 0; t < STEPS; t++) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint at = 8 * (t % (D / 8)) + 2 * (t / (D / 8));
    const float2 pair = float2(row[at], row[at + 1]) * unitary;
    const threadgroup float* from = best + (t & 1u) * STATES;
    float cost = 2.0f * FAR;
    uint choice = 0;
    for (uint i = 0; i < OWN; i++) {
      const float2 miss = pair - own[i];
      const float reached = from[(entry + i) & (STATES - 1)] + (miss.x * miss.x + miss.y * miss.y);
      if (reached < cost) {
        cost = reached;
        choice = entry + i;
      }
    }
    for (ushort apart = 1; apart < ushort(GROUP); apart *= 2) {
      const float other_cost = simd_shuffle_xor(cost, apart);
      const uint other = simd_shuffle_xor(choice, apart);
      if (other_cost < cost || (other_cost == cost && other < choice)) {
        cost = other_cost;
        choice = other;
      }
    }
    if (lane % GROUP == 0) {
      best[((t + 1) & 1u) * STATES + lane / GROUP] = cost;
      came[t * STATES + lane / GROUP] = uchar(choice & ((1u << KV) - 1u));
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) {
    const threadgroup float* end = best + (STEPS & 1u) * STATES;
    uint state = 0;
    for (uint i = 1; i < STATES; i++) {
      if (end[i] < end[state]) {
        state = i;
      }
    }
    for (uint t = STEPS; t > 0; t--) {
      const uint window = (state << KV) | uint(came[(t - 1) * STATES + state]);
      fresh[t - 1] = uchar(window >> (L - KV));
      state = window & (STATES - 1);
    }
  }
} else {
  turboquant_load_table<TRELLIS ? 0 : L>(codebook, table, lane, THREADS);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint t = lane; t < STEPS; t += THREADS) {
    const uint at = 8 * (t % (D / 8)) + 2 * (t / (D / 8));
    const float2 pair = float2(row[at], row[at + 1]) * unitary;
    float cost = FAR;
    uint choice = 0;
    for (uint i = 0; i < ENTRIES; i++) {
      const float2 miss = pair - float2(table[i]);
      const float reached = miss.x * miss.x + miss.y * miss.y;
      if (reached < cost) {
        cost = reached;
        choice = i;
      }
    }
    fresh[t] = uchar(choice);
  }
}

// Packing: word i holds bits [32i, 32i+32) of the stream.
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint i = lane; i < uint(WORDS); i += THREADS) {
  uint word = 0;
  for (uint t = 32 * i / KV; t < STEPS && t * KV < 32 * (i + 1); t++) {
    const int shift = int(t * KV) - int(32 * i);
    word |= shift < 0 ? uint(fresh[t]) >> uint(-shift) : uint(fresh[t]) << uint(shift);
  }
  codes[ulong(r) * WORDS + i] = word;
}
