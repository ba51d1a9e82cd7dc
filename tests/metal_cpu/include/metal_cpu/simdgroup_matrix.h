// 8x8 matrices held by a SIMD-group, two elements per lane: metal_simdgroup_matrix.
//
// Lane l holds row_of(l), columns column_of(l) and the next, the layout of Apple GPUs that MLX's own kernels rely on
// through thread_elements(). Products are accumulated in float.
#pragma once

namespace metal {
namespace detail {

METAL_CPU_INLINE constexpr uint row_of(uint lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
METAL_CPU_INLINE constexpr uint column_of(uint lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }

METAL_CPU_UNCHECKED inline void number_lanes(uint mask, const char*, char* out, const uint*, uint* fault) {
  if (mask != ~0u) *fault = fault_partial;
  for (uint i = 0; i < 32; i++)
    if (active(mask, i)) store<uint>(out, i, i);
}
// The lane's number, for which the whole SIMD-group must be there.
METAL_CPU_INLINE uint matrix_lane(METAL_CPU_TEXT name, METAL_CPU_SITE_PARAMETERS) {
  return collective(0u, 0, number_lanes, name, METAL_CPU_SITE);
}

template <class A, class B, class C>
struct operands {
  vec<A, 2> a;
  vec<B, 2> b;
  vec<C, 2> c;
};

template <class D, class A, class B, class C>
METAL_CPU_UNCHECKED void multiply_accumulate(uint mask, const char* in, char* out, const uint*, uint* fault) {
  if (mask != ~0u) {
    *fault = fault_partial;
    return;
  }
  float a[8][8], b[8][8], c[8][8];
  for (uint lane = 0; lane < 32; lane++) {
    const operands<A, B, C>& own = *(const operands<A, B, C>*)(in + 64 * lane);
    uint row = row_of(lane), column = column_of(lane);
    for (uint j = 0; j < 2; j++) {
      a[row][column + j] = own.a[j];
      b[row][column + j] = own.b[j];
      c[row][column + j] = own.c[j];
    }
  }
  for (uint i = 0; i < 8; i++)
    for (uint k = 0; k < 8; k++)
      for (uint j = 0; j < 8; j++) c[i][j] = __builtin_fmaf(a[i][k], b[k][j], c[i][j]);
  for (uint lane = 0; lane < 32; lane++) {
    uint row = row_of(lane), column = column_of(lane);
    store<vec<D, 2>>(out, lane, vec<D, 2>{(D)c[row][column], (D)c[row][column + 1]});
  }
}

}  // namespace detail

template <class T, int Rows, int Columns>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "Metal's simdgroup_matrix is 8x8");
  using storage_type = vec<T, 2>;
  storage_type own;
  METAL_CPU_INLINE simdgroup_matrix() thread {}
  // `diagonal` on the diagonal, zero elsewhere.
  METAL_CPU_INLINE explicit simdgroup_matrix(T diagonal, METAL_CPU_SITE_PARAMETERS) thread {
    uint lane = detail::matrix_lane("simdgroup_matrix", METAL_CPU_SITE);
    uint y = detail::row_of(lane), x = detail::column_of(lane);
    own = storage_type{y == x ? diagonal : (T)0, y == x + 1 ? diagonal : (T)0};
  }
  METAL_CPU_INLINE thread storage_type& thread_elements() thread { return own; }
  METAL_CPU_INLINE const thread storage_type& thread_elements() const thread { return own; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Rows, int Columns>
METAL_CPU_INLINE simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Rows, Columns> m;
  m.own = (vec<T, 2>)value;
  return m;
}

// `stride`: elements from one row of the memory to the next; `origin`: column and row to start at.
// The two elements of a lane are reported here, with the caller's line.
#define METAL_CPU_MATRIX_MEMORY(SPACE) \
  template <class T, class U> \
  METAL_CPU_UNCHECKED void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& m, const SPACE U* p, ulong stride = 8, \
                                          ulong2 origin = ulong2{0, 0}, bool transposed = false, \
                                          METAL_CPU_SITE_PARAMETERS) { \
    uint lane = detail::matrix_lane("simdgroup_load", METAL_CPU_SITE); \
    ulong y = detail::row_of(lane), x = detail::column_of(lane); \
    p += origin.y * stride + origin.x + (transposed ? x * stride + y : y * stride + x); \
    const SPACE U* second = p + (transposed ? stride : 1); \
    metal_cpu_access((const void*)p, sizeof(U), 0, file, line); \
    metal_cpu_access((const void*)second, sizeof(U), 0, file, line); \
    m.own = vec<T, 2>{(T)*p, (T)*second}; \
  } \
  template <class T, class U> \
  METAL_CPU_UNCHECKED void simdgroup_store(simdgroup_matrix<T, 8, 8> m, SPACE U* p, ulong stride = 8, \
                                           ulong2 origin = ulong2{0, 0}, bool transposed = false, \
                                           METAL_CPU_SITE_PARAMETERS) { \
    uint lane = detail::matrix_lane("simdgroup_store", METAL_CPU_SITE); \
    ulong y = detail::row_of(lane), x = detail::column_of(lane); \
    p += origin.y * stride + origin.x + (transposed ? x * stride + y : y * stride + x); \
    SPACE U* second = p + (transposed ? stride : 1); \
    metal_cpu_access((const void*)p, sizeof(U), 1, file, line); \
    *p = (U)m.own.x; \
    metal_cpu_access((const void*)second, sizeof(U), 1, file, line); \
    *second = (U)m.own.y; \
  }
METAL_CPU_MATRIX_MEMORY(device)
METAL_CPU_MATRIX_MEMORY(threadgroup)

template <class D, class A, class B, class C>
METAL_CPU_INLINE void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                                    simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c,
                                                    METAL_CPU_SITE_PARAMETERS) {
  detail::operands<A, B, C> in{a.own, b.own, c.own};
  metal_cpu_simd(&in, sizeof(in), &d.own, sizeof(d.own), 0, detail::multiply_accumulate<D, A, B, C>,
                 "simdgroup_multiply_accumulate", METAL_CPU_SITE);
}
template <class D, class A, class B>
METAL_CPU_INLINE void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                         simdgroup_matrix<B, 8, 8> b, METAL_CPU_SITE_PARAMETERS) {
  detail::operands<A, B, D> in{a.own, b.own, (vec<D, 2>)(D)0};
  metal_cpu_simd(&in, sizeof(in), &d.own, sizeof(d.own), 0, detail::multiply_accumulate<D, A, B, D>,
                 "simdgroup_multiply", METAL_CPU_SITE);
}
template <class T>
METAL_CPU_INLINE simdgroup_matrix<T, 8, 8> operator*(simdgroup_matrix<T, 8, 8> a, simdgroup_matrix<T, 8, 8> b) {
  simdgroup_matrix<T, 8, 8> d;
  simdgroup_multiply(d, a, b);
  return d;
}

}  // namespace metal
