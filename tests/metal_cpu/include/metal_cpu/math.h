// Floating-point, relational and geometric functions: metal_math, metal_relational, metal_geometric.
//
// half and bfloat are computed in float and rounded once, as MLX's own wrappers do for bfloat.
#pragma once

namespace metal {

// A function of scalars, componentwise for vectors; a vector may be combined with a scalar of its element type.
#define METAL_CPU_VECTOR_1(NAME) \
  template <class T, int N> \
  METAL_CPU_INLINE vec<T, N> NAME(vec<T, N> a) { \
    vec<T, N> r; \
    for (int i = 0; i < N; i++) r[i] = NAME((T)a[i]); \
    return r; \
  }
#define METAL_CPU_VECTOR_2(NAME) \
  template <class T, int N> \
  METAL_CPU_INLINE vec<T, N> NAME(vec<T, N> a, vec<T, N> b) { \
    vec<T, N> r; \
    for (int i = 0; i < N; i++) r[i] = NAME((T)a[i], (T)b[i]); \
    return r; \
  } \
  template <class T, int N> \
  METAL_CPU_INLINE vec<T, N> NAME(vec<T, N> a, type_identity_t<T> b) { \
    return NAME(a, (vec<T, N>)b); \
  }
#define METAL_CPU_VECTOR_3(NAME) \
  template <class T, int N> \
  METAL_CPU_INLINE vec<T, N> NAME(vec<T, N> a, vec<T, N> b, vec<T, N> c) { \
    vec<T, N> r; \
    for (int i = 0; i < N; i++) r[i] = NAME((T)a[i], (T)b[i], (T)c[i]); \
    return r; \
  } \
  template <class T, int N> \
  METAL_CPU_INLINE vec<T, N> NAME(vec<T, N> a, type_identity_t<T> b, type_identity_t<T> c) { \
    return NAME(a, (vec<T, N>)b, (vec<T, N>)c); \
  }

#define METAL_CPU_FLOAT_1(NAME, VALUE) \
  METAL_CPU_INLINE float NAME(float x) { return VALUE; } \
  METAL_CPU_INLINE half NAME(half h) { float x = h; return (half)(VALUE); } \
  METAL_CPU_INLINE bfloat NAME(bfloat h) { float x = h; return (bfloat)(VALUE); } \
  METAL_CPU_VECTOR_1(NAME)
#define METAL_CPU_FLOAT_2(NAME, VALUE) \
  METAL_CPU_INLINE float NAME(float x, float y) { return VALUE; } \
  METAL_CPU_INLINE half NAME(half g, half h) { float x = g, y = h; return (half)(VALUE); } \
  METAL_CPU_INLINE bfloat NAME(bfloat g, bfloat h) { float x = g, y = h; return (bfloat)(VALUE); } \
  METAL_CPU_VECTOR_2(NAME)
#define METAL_CPU_FLOAT_3(NAME, VALUE) \
  METAL_CPU_INLINE float NAME(float x, float y, float z) { return VALUE; } \
  METAL_CPU_INLINE half NAME(half f, half g, half h) { float x = f, y = g, z = h; return (half)(VALUE); } \
  METAL_CPU_INLINE bfloat NAME(bfloat f, bfloat g, bfloat h) { float x = f, y = g, z = h; return (bfloat)(VALUE); } \
  METAL_CPU_VECTOR_3(NAME)

#define METAL_CPU_C(f) __builtin_##f
namespace detail {
METAL_CPU_INLINE float saturated(float x) { return METAL_CPU_C(fminf)(METAL_CPU_C(fmaxf)(x, 0.0f), 1.0f); }
METAL_CPU_INLINE float smooth(float t) { return t * t * (3.0f - 2.0f * t); }
}  // namespace detail

// The same set in metal, metal::fast and metal::precise: MLX compiles custom kernels with safe mathematics.
#define METAL_CPU_MATHEMATICS \
  METAL_CPU_FLOAT_1(acos, METAL_CPU_C(acosf)(x)) \
  METAL_CPU_FLOAT_1(acosh, METAL_CPU_C(acoshf)(x)) \
  METAL_CPU_FLOAT_1(asin, METAL_CPU_C(asinf)(x)) \
  METAL_CPU_FLOAT_1(asinh, METAL_CPU_C(asinhf)(x)) \
  METAL_CPU_FLOAT_1(atan, METAL_CPU_C(atanf)(x)) \
  METAL_CPU_FLOAT_1(atanh, METAL_CPU_C(atanhf)(x)) \
  METAL_CPU_FLOAT_1(ceil, METAL_CPU_C(ceilf)(x)) \
  METAL_CPU_FLOAT_1(cos, METAL_CPU_C(cosf)(x)) \
  METAL_CPU_FLOAT_1(cosh, METAL_CPU_C(coshf)(x)) \
  METAL_CPU_FLOAT_1(cospi, METAL_CPU_C(cosf)(M_PI_F * x)) \
  METAL_CPU_FLOAT_1(exp, METAL_CPU_C(expf)(x)) \
  METAL_CPU_FLOAT_1(exp2, METAL_CPU_C(exp2f)(x)) \
  METAL_CPU_FLOAT_1(exp10, METAL_CPU_C(powf)(10.0f, x)) \
  METAL_CPU_FLOAT_1(fabs, METAL_CPU_C(fabsf)(x)) \
  METAL_CPU_FLOAT_1(floor, METAL_CPU_C(floorf)(x)) \
  METAL_CPU_FLOAT_1(fract, METAL_CPU_C(fminf)(x - METAL_CPU_C(floorf)(x), 0x1.fffffep-1f)) \
  METAL_CPU_FLOAT_1(log, METAL_CPU_C(logf)(x)) \
  METAL_CPU_FLOAT_1(log2, METAL_CPU_C(log2f)(x)) \
  METAL_CPU_FLOAT_1(log10, METAL_CPU_C(log10f)(x)) \
  METAL_CPU_FLOAT_1(rint, METAL_CPU_C(rintf)(x)) \
  METAL_CPU_FLOAT_1(round, METAL_CPU_C(roundf)(x)) \
  METAL_CPU_FLOAT_1(rsqrt, 1.0f / METAL_CPU_C(sqrtf)(x)) \
  METAL_CPU_FLOAT_1(saturate, detail::saturated(x)) \
  METAL_CPU_FLOAT_1(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x == x ? x : 0.0f) \
  METAL_CPU_FLOAT_1(sin, METAL_CPU_C(sinf)(x)) \
  METAL_CPU_FLOAT_1(sinh, METAL_CPU_C(sinhf)(x)) \
  METAL_CPU_FLOAT_1(sinpi, METAL_CPU_C(sinf)(M_PI_F * x)) \
  METAL_CPU_FLOAT_1(sqrt, METAL_CPU_C(sqrtf)(x)) \
  METAL_CPU_FLOAT_1(tan, METAL_CPU_C(tanf)(x)) \
  METAL_CPU_FLOAT_1(tanh, METAL_CPU_C(tanhf)(x)) \
  METAL_CPU_FLOAT_1(trunc, METAL_CPU_C(truncf)(x)) \
  METAL_CPU_FLOAT_2(atan2, METAL_CPU_C(atan2f)(x, y)) \
  METAL_CPU_FLOAT_2(copysign, METAL_CPU_C(copysignf)(x, y)) \
  METAL_CPU_FLOAT_2(divide, x / y) \
  METAL_CPU_FLOAT_2(fdim, METAL_CPU_C(fdimf)(x, y)) \
  METAL_CPU_FLOAT_2(fmax, METAL_CPU_C(fmaxf)(x, y)) \
  METAL_CPU_FLOAT_2(fmin, METAL_CPU_C(fminf)(x, y)) \
  METAL_CPU_FLOAT_2(fmod, METAL_CPU_C(fmodf)(x, y)) \
  METAL_CPU_FLOAT_2(max, METAL_CPU_C(fmaxf)(x, y)) \
  METAL_CPU_FLOAT_2(min, METAL_CPU_C(fminf)(x, y)) \
  METAL_CPU_FLOAT_2(pow, METAL_CPU_C(powf)(x, y)) \
  METAL_CPU_FLOAT_2(powr, METAL_CPU_C(powf)(x, y)) \
  METAL_CPU_FLOAT_2(step, y < x ? 0.0f : 1.0f) \
  METAL_CPU_FLOAT_3(clamp, METAL_CPU_C(fminf)(METAL_CPU_C(fmaxf)(x, y), z)) \
  METAL_CPU_FLOAT_3(fma, METAL_CPU_C(fmaf)(x, y, z)) \
  METAL_CPU_FLOAT_3(mad, x* y + z) \
  METAL_CPU_FLOAT_3(mix, x + (y - x) * z) \
  METAL_CPU_FLOAT_3(smoothstep, detail::smooth(detail::saturated((z - x) / (y - x))))

METAL_CPU_MATHEMATICS
METAL_CPU_FLOAT_1(abs, METAL_CPU_C(fabsf)(x))
namespace fast {
METAL_CPU_MATHEMATICS
}
namespace precise {
METAL_CPU_MATHEMATICS
}

METAL_CPU_INLINE float ldexp(float x, int k) { return METAL_CPU_C(ldexpf)(x, k); }
METAL_CPU_INLINE half ldexp(half x, int k) { return (half)METAL_CPU_C(ldexpf)(x, k); }
METAL_CPU_INLINE int ilogb(float x) { return METAL_CPU_C(ilogbf)(x); }
METAL_CPU_INLINE float frexp(float x, thread int& e) { return METAL_CPU_C(frexpf)(x, &e); }
METAL_CPU_INLINE float modf(float x, thread float& whole) { return METAL_CPU_C(modff)(x, &whole); }

#define METAL_CPU_CLASSES(T) \
  METAL_CPU_INLINE bool isnan(T x) { return (float)x != (float)x; } \
  METAL_CPU_INLINE bool isinf(T x) { return METAL_CPU_C(fabsf)((float)x) == INFINITY; } \
  METAL_CPU_INLINE bool isfinite(T x) { return METAL_CPU_C(fabsf)((float)x) < INFINITY; }
METAL_CPU_CLASSES(float)
METAL_CPU_CLASSES(half)
METAL_CPU_CLASSES(bfloat)
METAL_CPU_INLINE bool signbit(float x) { return as_type<uint>(x) >> 31; }

template <class T>
METAL_CPU_INLINE enable_if_t<!is_vector_v<T>, T> select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, int N, class M>
METAL_CPU_INLINE vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<M, N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
METAL_CPU_INLINE bool any(bool b) { return b; }
METAL_CPU_INLINE bool all(bool b) { return b; }
template <class M, int N>
METAL_CPU_INLINE bool any(vec<M, N> v) {
  bool r = false;
  for (int i = 0; i < N; i++) r = r || v[i];
  return r;
}
template <class M, int N>
METAL_CPU_INLINE bool all(vec<M, N> v) {
  bool r = true;
  for (int i = 0; i < N; i++) r = r && v[i];
  return r;
}

template <class T, int N>
METAL_CPU_INLINE T dot(vec<T, N> a, vec<T, N> b) {
  T s = a[0] * b[0];
  for (int i = 1; i < N; i++) s += a[i] * b[i];
  return s;
}
template <class T, int N>
METAL_CPU_INLINE T length_squared(vec<T, N> a) {
  return dot(a, a);
}
template <class T, int N>
METAL_CPU_INLINE T length(vec<T, N> a) {
  return sqrt(dot(a, a));
}
template <class T, int N>
METAL_CPU_INLINE T distance(vec<T, N> a, vec<T, N> b) {
  return length(a - b);
}
template <class T, int N>
METAL_CPU_INLINE vec<T, N> normalize(vec<T, N> a) {
  return a * rsqrt(dot(a, a));
}
template <class T>
METAL_CPU_INLINE vec<T, 3> cross(vec<T, 3> a, vec<T, 3> b) {
  return vec<T, 3>{a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x};
}

}  // namespace metal
