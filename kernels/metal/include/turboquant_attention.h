// Reading runs of codes into SIMD-group matrices, for kernels that multiply with them. Row format: turboquant.h.

// For loops over arrays of matrices: an index known only at run time would move them from registers to memory.
#define TURBOQUANT_UNROLL _Pragma("clang loop unroll(full)")

// Words that hold the windows of N successive steps: KV new bits each and what the first window carries over.
template <int KV, int L, int N>
struct turboquant_run {
  static constant constexpr const int words = (KV * N + L - KV + 31) / 32;
};

// The bits of steps t .. t+N-1 of a row, shifted so that the window of step t+i begins at bit KV*i; zeros stand before
// the start of the row. `row` points to the row's words, in whichever address space; no word past the run is read.
template <int KV, int L, int N, typename Row>
inline void turboquant_load_run(Row row, uint t, thread uint* bits) {
  const int begin = KV * int(t) - (L - KV);  // negative at the start of the row: L - KV < 32
  const int last = (KV * (int(t) + N) - 1) / 32;
  const int word = (begin + 32) / 32 - 1;
  const uint shift = uint(begin + 32) & 31u;
  uint low = word < 0 ? 0u : row[word];
  TURBOQUANT_UNROLL
  for (int i = 0; i < turboquant_run<KV, L, N>::words; i++) {
    const uint high = row[min(word + 1 + i, last)];
    // Two shifts, as one by 32 is undefined.
    bits[i] = (low >> shift) | ((high << 1) << (31u - shift));
    low = high;
  }
}

// Table index of the i-th step of a run.
template <int KV, int L>
inline uint turboquant_run_window(const thread uint* bits, int i) {
  const int word = KV * i / 32;
  const int shift = KV * i % 32;
  uint window = bits[word] >> shift;
  if (shift + L > 32) {
    window |= bits[word + 1] << (32 - shift);
  }
  return window & ((1u << L) - 1u);
}
