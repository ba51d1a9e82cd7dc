// Barriers and SIMD-group functions: metal_simdgroup, metal_synchronization.
//
// A call hands its value to the runtime, which holds the lane until the whole SIMD-group stands at the same call, and
// then applies the function below to all lanes at once. Leaves the 8x8 matrices to simdgroup_matrix.h.
#pragma once

namespace metal {

enum class mem_flags {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8
};
METAL_CPU_INLINE constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((int)a | (int)b); }

METAL_CPU_INLINE void threadgroup_barrier(mem_flags flags, METAL_CPU_SITE_PARAMETERS) {
  metal_cpu_barrier(1, (int)flags, METAL_CPU_SITE);
}
METAL_CPU_INLINE void simdgroup_barrier(mem_flags flags, METAL_CPU_SITE_PARAMETERS) {
  metal_cpu_barrier(0, (int)flags, METAL_CPU_SITE);
}

namespace detail {

// What the functions leave in *fault; runtime/scheduler.cpp has the sentences.
enum { fault_range = 1, fault_inactive = 2, fault_not_uniform = 3, fault_partial = 4 };

template <class T>
METAL_CPU_UNCHECKED inline T load(const char* slots, uint lane) {
  return *(const T*)(slots + 64 * lane);
}
template <class T>
METAL_CPU_UNCHECKED inline void store(char* slots, uint lane, T value) {
  *(T*)(slots + 64 * lane) = value;
}
METAL_CPU_INLINE bool active(uint mask, uint lane) { return lane < 32 && (mask >> lane & 1); }

template <class T>
METAL_CPU_INLINE T collective(T value, uint argument, metal_cpu_simd_function function, METAL_CPU_TEXT name,
                              METAL_CPU_SITE_PARAMETERS) {
  static_assert(sizeof(T) <= 64, "a SIMD-group function's argument is at most 64 bytes");
  T result;
  metal_cpu_simd(&value, sizeof(T), &result, sizeof(T), argument, function, name, METAL_CPU_SITE);
  return result;
}

struct add {
  template <class T>
  METAL_CPU_UNCHECKED static T of(T a, T b) { return a + b; }
};
struct multiply {
  template <class T>
  METAL_CPU_UNCHECKED static T of(T a, T b) { return a * b; }
};
struct maximum {
  template <class T>
  METAL_CPU_UNCHECKED static T of(T a, T b) { return max(a, b); }
};
struct minimum {
  template <class T>
  METAL_CPU_UNCHECKED static T of(T a, T b) { return min(a, b); }
};
struct bit_and {
  template <class T>
  METAL_CPU_UNCHECKED static T of(T a, T b) { return a & b; }
};
struct bit_or {
  template <class T>
  METAL_CPU_UNCHECKED static T of(T a, T b) { return a | b; }
};
struct bit_xor {
  template <class T>
  METAL_CPU_UNCHECKED static T of(T a, T b) { return a ^ b; }
};

// Neighbours first, as Apple GPUs reduce: mlx-lm's kernels count on that order to agree bit by bit.
template <class T, class Operation>
METAL_CPU_UNCHECKED void reduce(uint mask, const char* in, char* out, const uint*, uint*) {
  T values[32];
  uint have = mask;
  for (uint i = 0; i < 32; i++)
    if (active(have, i)) values[i] = load<T>(in, i);
  for (uint step = 1; step < 32; step <<= 1)
    for (uint i = 0; i < 32; i += 2 * step) {
      bool low = active(have, i), high = active(have, i + step);
      if (low && high) values[i] = Operation::of(values[i], values[i + step]);
      if (!low && high) values[i] = values[i + step], have |= 1u << i;
    }
  for (uint i = 0; i < 32; i++)
    if (active(mask, i)) store<T>(out, i, values[0]);
}

template <class T, class Operation, bool Inclusive, int Identity>
METAL_CPU_UNCHECKED void prefix(uint mask, const char* in, char* out, const uint*, uint*) {
  T sum = (T)Identity;
  for (uint i = 0; i < 32; i++)
    if (active(mask, i)) {
      T next = Operation::of(sum, load<T>(in, i));
      store<T>(out, i, Inclusive ? next : sum);
      sum = next;
    }
}

enum shuffle_kind { by_lane, by_xor, by_up, by_down, by_rotate_up, by_rotate_down, by_broadcast, by_first };

template <class T, int Kind>
METAL_CPU_UNCHECKED void shuffle(uint mask, const char* in, char* out, const uint* argument, uint* fault) {
  uint first = __builtin_ctz(mask);
  for (uint i = 0; i < 32; i++) {
    if (!active(mask, i)) continue;
    uint n = argument[i], from = n;
    if (Kind == by_xor) from = i ^ n;
    if (Kind == by_up) from = i >= n ? i - n : i;         // lanes shifted in keep their own value
    if (Kind == by_down) from = i + n < 32 ? i + n : i;
    if (Kind == by_rotate_up) from = (i - n) & 31;
    if (Kind == by_rotate_down) from = (i + n) & 31;
    if (Kind == by_first) from = first;
    if (Kind == by_broadcast && n != argument[first]) *fault = fault_not_uniform;
    if (!active(mask, from)) *fault = from > 31 ? fault_range : fault_inactive, from = i;
    store<T>(out, i, load<T>(in, from));
  }
}

// out: the lanes whose value is not zero, and the lanes that take part.
METAL_CPU_UNCHECKED inline void ballot(uint mask, const char* in, char* out, const uint*, uint*) {
  uint votes = 0;
  for (uint i = 0; i < 32; i++)
    if (active(mask, i) && load<uint2>(in, i).x) votes |= 1u << i;
  for (uint i = 0; i < 32; i++)
    if (active(mask, i)) store<uint2>(out, i, uint2{votes, mask});
}
METAL_CPU_INLINE uint2 vote(bool yes, METAL_CPU_TEXT name, METAL_CPU_SITE_PARAMETERS) {
  return collective(uint2{yes, 0}, 0, ballot, name, METAL_CPU_SITE);
}

template <class T, int Kind>
METAL_CPU_UNCHECKED void quad_shuffle(uint mask, const char* in, char* out, const uint* argument, uint* fault) {
  for (uint i = 0; i < 32; i++) {
    if (!active(mask, i)) continue;
    uint n = argument[i], from = Kind == by_xor ? i ^ n : (i & ~3u) | n;
    if (n > 3 || !active(mask, from)) *fault = n > 3 ? fault_range : fault_inactive, from = i;
    store<T>(out, i, load<T>(in, from));
  }
}
template <class T, class Operation>
METAL_CPU_UNCHECKED void quad_reduce(uint mask, const char* in, char* out, const uint*, uint* fault) {
  if (mask != ~0u) *fault = fault_partial;
  for (uint q = 0; q < 32; q += 4) {
    T sum = load<T>(in, q);
    for (uint i = q + 1; i < q + 4; i++) sum = Operation::of(sum, load<T>(in, i));
    for (uint i = q; i < q + 4; i++) store<T>(out, i, sum);
  }
}

// metal::simd_* takes 8-, 16- and 32-bit elements; MLX adds bool and 64 bits to three shuffles (see mlx.h).
template <class T>
constexpr bool simd_type = sizeof(elem_t<T>) <= 4 && !is_same_v<T, bool>;

}  // namespace detail

#define METAL_CPU_SIMD_TYPE(T) \
  static_assert(detail::simd_type<T>, "SIMD-group functions take elements of 8, 16 or 32 bits, not bool")

#define METAL_CPU_REDUCTION(NAME, OPERATION) \
  template <class T> \
  METAL_CPU_INLINE T NAME(T value, METAL_CPU_SITE_PARAMETERS) { \
    METAL_CPU_SIMD_TYPE(T); \
    return detail::collective(value, 0, OPERATION, #NAME, METAL_CPU_SITE); \
  }
#define METAL_CPU_COMMA ,
METAL_CPU_REDUCTION(simd_sum, detail::reduce<T METAL_CPU_COMMA detail::add>)
METAL_CPU_REDUCTION(simd_product, detail::reduce<T METAL_CPU_COMMA detail::multiply>)
METAL_CPU_REDUCTION(simd_max, detail::reduce<T METAL_CPU_COMMA detail::maximum>)
METAL_CPU_REDUCTION(simd_min, detail::reduce<T METAL_CPU_COMMA detail::minimum>)
METAL_CPU_REDUCTION(simd_and, detail::reduce<T METAL_CPU_COMMA detail::bit_and>)
METAL_CPU_REDUCTION(simd_or, detail::reduce<T METAL_CPU_COMMA detail::bit_or>)
METAL_CPU_REDUCTION(simd_xor, detail::reduce<T METAL_CPU_COMMA detail::bit_xor>)
METAL_CPU_REDUCTION(quad_sum, detail::quad_reduce<T METAL_CPU_COMMA detail::add>)
METAL_CPU_REDUCTION(quad_max, detail::quad_reduce<T METAL_CPU_COMMA detail::maximum>)
METAL_CPU_REDUCTION(quad_min, detail::quad_reduce<T METAL_CPU_COMMA detail::minimum>)
METAL_CPU_REDUCTION(simd_prefix_inclusive_sum,
                    detail::prefix<T METAL_CPU_COMMA detail::add METAL_CPU_COMMA true METAL_CPU_COMMA 0>)
METAL_CPU_REDUCTION(simd_prefix_exclusive_sum,
                    detail::prefix<T METAL_CPU_COMMA detail::add METAL_CPU_COMMA false METAL_CPU_COMMA 0>)
METAL_CPU_REDUCTION(simd_prefix_inclusive_product,
                    detail::prefix<T METAL_CPU_COMMA detail::multiply METAL_CPU_COMMA true METAL_CPU_COMMA 1>)
METAL_CPU_REDUCTION(simd_prefix_exclusive_product,
                    detail::prefix<T METAL_CPU_COMMA detail::multiply METAL_CPU_COMMA false METAL_CPU_COMMA 1>)
METAL_CPU_REDUCTION(simd_broadcast_first, detail::shuffle<T METAL_CPU_COMMA detail::by_first>)

#define METAL_CPU_SHUFFLE(NAME, FUNCTION, KIND) \
  template <class T> \
  METAL_CPU_INLINE T NAME(T value, ushort n, METAL_CPU_SITE_PARAMETERS) { \
    METAL_CPU_SIMD_TYPE(T); \
    return detail::collective(value, n, detail::FUNCTION<T, detail::KIND>, #NAME, METAL_CPU_SITE); \
  }
METAL_CPU_SHUFFLE(simd_shuffle, shuffle, by_lane)
METAL_CPU_SHUFFLE(simd_shuffle_xor, shuffle, by_xor)
METAL_CPU_SHUFFLE(simd_shuffle_up, shuffle, by_up)
METAL_CPU_SHUFFLE(simd_shuffle_down, shuffle, by_down)
METAL_CPU_SHUFFLE(simd_shuffle_rotate_up, shuffle, by_rotate_up)
METAL_CPU_SHUFFLE(simd_shuffle_rotate_down, shuffle, by_rotate_down)
METAL_CPU_SHUFFLE(simd_broadcast, shuffle, by_broadcast)
METAL_CPU_SHUFFLE(quad_shuffle_xor, quad_shuffle, by_xor)
METAL_CPU_SHUFFLE(quad_shuffle, quad_shuffle, by_lane)
METAL_CPU_SHUFFLE(quad_broadcast, quad_shuffle, by_lane)

struct simd_vote {
  typedef ulong vote_t;
  ulong lanes;
  METAL_CPU_INLINE bool all() const { return lanes == 0xffffffffu; }
  METAL_CPU_INLINE bool any() const { return lanes != 0; }
  METAL_CPU_INLINE explicit operator ulong() const { return lanes; }
};
METAL_CPU_INLINE simd_vote simd_ballot(bool yes, METAL_CPU_SITE_PARAMETERS) {
  return simd_vote{detail::vote(yes, "simd_ballot", METAL_CPU_SITE).x};
}
METAL_CPU_INLINE simd_vote simd_active_threads_mask(METAL_CPU_SITE_PARAMETERS) {
  return simd_vote{detail::vote(true, "simd_active_threads_mask", METAL_CPU_SITE).y};
}
METAL_CPU_INLINE bool simd_all(bool yes, METAL_CPU_SITE_PARAMETERS) {
  uint2 votes = detail::vote(yes, "simd_all", METAL_CPU_SITE);
  return votes.x == votes.y;
}
METAL_CPU_INLINE bool simd_any(bool yes, METAL_CPU_SITE_PARAMETERS) {
  return detail::vote(yes, "simd_any", METAL_CPU_SITE).x != 0;
}

}  // namespace metal
