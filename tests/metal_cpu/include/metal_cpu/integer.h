// Integer functions of scalars: metal_integer. math.h, which follows, makes min, max, clamp and abs componentwise.
#pragma once

namespace metal {

#define METAL_CPU_INTEGER(T) \
  METAL_CPU_INLINE constexpr T max(T a, T b) { return a > b ? a : b; } \
  METAL_CPU_INLINE constexpr T min(T a, T b) { return a < b ? a : b; } \
  METAL_CPU_INLINE constexpr T clamp(T x, T a, T b) { return min(max(x, a), b); } \
  METAL_CPU_INLINE constexpr T abs(T x) { return x < (T)0 ? (T)-x : x; }
METAL_CPU_INTEGER(char)
METAL_CPU_INTEGER(int8_t)
METAL_CPU_INTEGER(uchar)
METAL_CPU_INTEGER(short)
METAL_CPU_INTEGER(ushort)
METAL_CPU_INTEGER(int)
METAL_CPU_INTEGER(uint)
METAL_CPU_INTEGER(long)
METAL_CPU_INTEGER(ulong)

template <class T>
METAL_CPU_INLINE T max3(T a, T b, T c) {
  return max(a, max(b, c));
}
template <class T>
METAL_CPU_INLINE T min3(T a, T b, T c) {
  return min(a, min(b, c));
}

namespace detail {
template <class T>
constexpr uint bits = 8 * sizeof(T);
template <class T>
METAL_CPU_INLINE ulong widened(T x) {
  return (ulong)(__make_unsigned(T))x;
}
}  // namespace detail

template <class T>
METAL_CPU_INLINE T popcount(T x) {
  if constexpr (is_vector_v<T>) {
    T r;
    for (int i = 0; i < detail::shape<T>::n; i++) r[i] = popcount(x[i]);
    return r;
  } else {
    return (T)__builtin_popcountll(detail::widened(x));
  }
}
template <class T>
METAL_CPU_INLINE T clz(T x) {
  return x ? (T)(__builtin_clzll(detail::widened(x)) - 64 + detail::bits<T>) : (T)detail::bits<T>;
}
template <class T>
METAL_CPU_INLINE T ctz(T x) {
  return x ? (T)__builtin_ctzll(detail::widened(x)) : (T)detail::bits<T>;
}
template <class T>
METAL_CPU_INLINE T reverse_bits(T x) {
  T r = 0;
  for (uint i = 0; i < detail::bits<T>; i++) r = (T)((r << 1) | ((x >> i) & 1));
  return r;
}
template <class T>
METAL_CPU_INLINE T rotate(T x, T n) {
  using U = __make_unsigned(T);
  int k = (int)(n & (detail::bits<T> - 1));
  return k ? (T)(((U)x << k) | ((U)x >> (detail::bits<T> - k))) : x;
}
template <class T>
METAL_CPU_INLINE T extract_bits(T x, uint offset, uint count) {
  using U = __make_unsigned(T);
  uint left = detail::bits<T> - count;
  return count == 0 ? (T)0 : (T)((T)((U)x << (left - offset)) >> left);
}
template <class T>
METAL_CPU_INLINE T insert_bits(T base, T insert, uint offset, uint count) {
  using U = __make_unsigned(T);
  U mask = (count >= detail::bits<T> ? ~(U)0 : (U)(((U)1 << count) - 1)) << offset;
  return (T)(((U)base & ~mask) | (((U)insert << offset) & mask));
}
METAL_CPU_INLINE uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
METAL_CPU_INLINE int mulhi(int a, int b) { return (int)(((long)a * b) >> 32); }
METAL_CPU_INLINE ulong mulhi(ulong a, ulong b) { return (ulong)(((unsigned __int128)a * b) >> 64); }

METAL_CPU_INLINE float4 unpack_unorm4x8_to_float(uint p) {
  return float4{(float)(p & 255), (float)((p >> 8) & 255), (float)((p >> 16) & 255), (float)(p >> 24)} / 255.0f;
}

}  // namespace metal
