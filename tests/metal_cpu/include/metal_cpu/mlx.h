// What MLX puts before every custom kernel (mlx/backend/metal/kernels/utils.h), as far as kernels use it: `using
// namespace metal`, Limits, elem_to_loc, ceildiv, log1p and shuffles of 64-bit integers and bool.
#pragma once

using namespace metal;

#define MLX_MTL_PRAGMA_UNROLL _Pragma("clang loop unroll(full)")

template <class U>
struct Limits {
  static constexpr U finite_max = numeric_limits<U>::max(), finite_min = numeric_limits<U>::lowest();
  static constexpr U max = is_floating_point_v<U> ? numeric_limits<U>::infinity() : finite_max;
  static constexpr U min = is_floating_point_v<U> ? (U)-numeric_limits<U>::infinity() : finite_min;
};

template <class Index = int64_t>
METAL_FUNC Index elem_to_loc(Index elem, constant const int* shape, constant const int64_t* strides, int ndim) {
  Index loc = 0;
  for (int i = ndim - 1; i >= 0 && elem > 0; --i) {
    loc += (elem % shape[i]) * Index(strides[i]);
    elem /= shape[i];
  }
  return loc;
}
template <class Index = int64_t>
METAL_FUNC Index elem_to_loc(uint3 elem, constant const int* shape, constant const int64_t* strides, int ndim) {
  Index loc = elem.x * Index(strides[ndim - 1]) + elem.y * Index(strides[ndim - 2]);
  for (int d = ndim - 3; d >= 0; --d) {
    loc += (elem.z % shape[d]) * Index(strides[d]);
    elem.z /= shape[d];
  }
  return loc;
}
template <class Index = int64_t>
METAL_FUNC Index elem_to_loc_1(uint elem, constant const int64_t& stride) {
  return elem * Index(stride);
}
template <class Index = int64_t>
METAL_FUNC Index elem_to_loc_2(uint2 elem, constant const int64_t* strides) {
  return elem.x * Index(strides[1]) + elem.y * Index(strides[0]);
}
template <class Index = int64_t>
METAL_FUNC Index elem_to_loc_3(uint3 elem, constant const int64_t* strides) {
  return elem.x * Index(strides[2]) + elem.y * Index(strides[1]) + elem.z * Index(strides[0]);
}

template <class T, class U>
METAL_FUNC T ceildiv(T n, U m) {
  return (n + m - 1) / m;
}
METAL_FUNC float log1p(float x) { return __builtin_log1pf(x); }
METAL_FUNC bfloat16_t log1p(bfloat16_t x) { return (bfloat16_t)__builtin_log1pf((float)x); }

#define METAL_CPU_MLX_SHUFFLE(NAME, TYPE) \
  METAL_CPU_INLINE TYPE NAME(TYPE data, ushort n, METAL_CPU_SITE_PARAMETERS) { \
    return as_type<TYPE>(metal::NAME(as_type<uint2>(data), n, METAL_CPU_SITE)); \
  }
#define METAL_CPU_MLX_SHUFFLES(NAME) \
  METAL_CPU_MLX_SHUFFLE(NAME, uint64_t) \
  METAL_CPU_MLX_SHUFFLE(NAME, int64_t) \
  METAL_CPU_INLINE bool NAME(bool data, ushort n, METAL_CPU_SITE_PARAMETERS) { \
    return metal::NAME((uint)data, n, METAL_CPU_SITE); \
  }
METAL_CPU_MLX_SHUFFLES(simd_shuffle)
METAL_CPU_MLX_SHUFFLES(simd_shuffle_up)
METAL_CPU_MLX_SHUFFLES(simd_shuffle_down)
