// The KV codec's row format and rotation, for every kernel that reads or writes codes. The format is described in
// kernels/turboquant.py; KV is the number of new bits per pair of coordinates, L the bits of a table index.

// Pair step at which coordinates 8f+2j and 8f+2j+1 of a row of `width` are coded: lane column pair j of fragment f.
inline uint turboquant_step(uint width, uint f, uint j) {
  return (width / 8) * j + f;
}

// Table index at step t: bits [KV*(t+1)-L, KV*(t+1)) of the row's stream, zeros before its start. `row` is the first of
// the row's uint32 words; no word outside the row is read. (MLX passes arrays of fewer than 8 elements in another
// address space; a buffer of codes is never that small.)
template <int KV, int L>
inline uint turboquant_window(const device uint* row, uint t) {
  const int end = KV * (int(t) + 1);
  const uint start = uint(max(end - L, 0));
  const uint low = row[start >> 5];
  const uint high = row[uint(end - 1) >> 5];
  // Where both are the same word, what `high` adds lies above the window. Two shifts, as one by 32 is undefined.
  const uint bits = (low >> (start & 31u)) | ((high << 1) << (31u - (start & 31u)));
  return (bits << uint(max(L - end, 0))) & ((1u << L) - 1u);
}

// The pair of coordinates at step t, before any scale or gain. `table` has 2^L entries (see turboquant_load_table).
template <int KV, int L>
inline half2 turboquant_pair(const device uint* row, uint t, const threadgroup half2* table) {
  return table[turboquant_window<KV, L>(row, t)];
}

// Copies a codebook, float16 [2^L, 2], into threadgroup memory with all `threads` threads; a barrier must follow.
template <int L>
inline void turboquant_load_table(const device half* codebook, threadgroup half2* table, uint lane, uint threads) {
  for (uint i = lane; i < (1u << L); i += threads) {
    table[i] = half2(codebook[2 * i], codebook[2 * i + 1]);
  }
}

// Hadamard transform of x[D], in place and without a scale, by all `threads` threads. Begins with a barrier (what was
// written to x is seen) and ends without one.
template <int D>
inline void turboquant_hadamard(threadgroup float* x, uint lane, uint threads) {
  for (uint apart = 1; apart < uint(D); apart *= 2) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = lane; i < uint(D / 2); i += threads) {
      const uint a = 2 * i - (i & (apart - 1));  // i with a zero inserted at the bit of apart
      const float left = x[a];
      const float right = x[a + apart];
      x[a] = left + right;
      x[a + apart] = left - right;
    }
  }
}
