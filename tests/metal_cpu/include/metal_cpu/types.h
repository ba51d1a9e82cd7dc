// Scalar and vector types, type traits and numeric limits.
#pragma once

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef __bf16 bfloat;
typedef half float16_t;
typedef bfloat bfloat16_t;
typedef float float32_t;

namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

// ---- traits

template <class T, T V>
struct integral_constant {
  static constexpr T value = V;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return V; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, class T, class F>
struct conditional {
  using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;

template <class A, class B>
struct is_same : false_type {};
template <class A>
struct is_same<A, A> : true_type {};
template <class A, class B>
constexpr bool is_same_v = is_same<A, B>::value;

template <class T>
using remove_cv_t = __remove_cv(T);
template <class T>
using remove_const_t = __remove_const(T);
template <class T>
using remove_reference_t = __remove_reference_t(T);
template <class T>
struct remove_cv {
  using type = __remove_cv(T);
};
template <class T>
struct remove_reference {
  using type = __remove_reference_t(T);
};
template <class T>
struct type_identity {
  using type = T;
};
template <class T>
using type_identity_t = typename type_identity<T>::type;

template <class T>
constexpr bool is_integral_v = __is_integral(T);
template <class T>
constexpr bool is_floating_point_v = __is_floating_point(T) || is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T>
constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T>
constexpr bool is_signed_v = __is_signed(T) || is_floating_point_v<T>;
template <class T>
constexpr bool is_unsigned_v = __is_unsigned(T);
template <class A, class B>
constexpr bool is_convertible_v = __is_convertible(A, B);
template <class A, class B>
constexpr bool is_base_of_v = __is_base_of(A, B);
template <class T>
struct is_integral : bool_constant<is_integral_v<T>> {};
template <class T>
struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T>
struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class T>
struct is_signed : bool_constant<is_signed_v<T>> {};
template <class T>
struct is_unsigned : bool_constant<is_unsigned_v<T>> {};
template <class T>
using make_unsigned_t = __make_unsigned(T);
template <class T>
struct make_unsigned {
  using type = __make_unsigned(T);
};

template <class T>
struct remove_addrspace {
  using type = T;
};
template <class T>
struct remove_addrspace<device T> {
  using type = T;
};
template <class T>
struct remove_addrspace<threadgroup T> {
  using type = T;
};
template <class T>
struct remove_addrspace<constant T> {
  using type = const T;
};
template <class T>
struct remove_addrspace<thread T> {
  using type = T;
};
template <class T>
struct remove_addrspace<__generic T> {
  using type = T;
};
template <class T>
using remove_addrspace_t = typename remove_addrspace<T>::type;

// ---- vectors

namespace detail {
// elem: of a vector, or the type itself; n: components, 0 for a scalar.
template <class T>
struct shape_of {
  using elem = T;
  static constexpr int n = 0;
};
template <class T>
struct shape_of<vec<T, 2>> {
  using elem = T;
  static constexpr int n = 2;
};
template <class T>
struct shape_of<vec<T, 3>> {
  using elem = T;
  static constexpr int n = 3;
};
template <class T>
struct shape_of<vec<T, 4>> {
  using elem = T;
  static constexpr int n = 4;
};
template <class T>
struct shape : shape_of<remove_cv_t<remove_addrspace_t<remove_cv_t<T>>>> {};
template <class T>
using elem_t = typename shape<T>::elem;
template <class T>
constexpr int components = shape<T>::n ? shape<T>::n : 1;

template <class V, class A>
METAL_CPU_INLINE void append(V& v, int& i, A a) {
  if constexpr (shape<A>::n > 0) {
    for (int j = 0; j < shape<A>::n; j++) v[i++] = (elem_t<V>)a[j];
  } else {
    v[i++] = (elem_t<V>)a;
  }
}

// float4(a, b, c, d), which C++ has no syntax for with this kind of vector; the macros in metal_stdlib lead here.
template <class V, class First, class... More>
METAL_CPU_INLINE V make(First first, More... more) {
  if constexpr (sizeof...(More) == 0 && shape<First>::n == 0) {
    return (V)(elem_t<V>)first;
  } else {
    static_assert((components<First> + ... + components<More>) == shape<V>::n,
                  "vector constructor: wrong number of components");
    V v;
    int i = 0;
    append(v, i, first);
    (append(v, i, more), ...);
    return v;
  }
}
template <class V>
METAL_CPU_INLINE V make() {
  return (V)(elem_t<V>)0;
}
// static_cast<float4>(half4); rewrite.py leads here.
template <class To, class From>
METAL_CPU_INLINE To cast(From&& x) {
  return make<To>((remove_cv_t<remove_addrspace_t<remove_reference_t<From>>>)x);
}
}  // namespace detail

template <class T>
constexpr bool is_vector_v = detail::shape<T>::n > 0;
template <class T>
struct is_vector : bool_constant<is_vector_v<T>> {};
template <class T>
struct vec_elem {
  using type = detail::elem_t<T>;
};

// ---- limits

template <class T>
struct numeric_limits {
  static constexpr bool is_specialized = false;
};
#define METAL_CPU_LIMITS(T, MIN, MAX, LOWEST, DIGITS, FLOATING, INFINITE, QUIET_NAN, EPSILON) \
  template <> \
  struct numeric_limits<T> { \
    static constexpr bool is_specialized = true, is_signed = (LOWEST) < (T)0, is_integer = !FLOATING; \
    static constexpr int digits = DIGITS; \
    static constexpr T min() { return MIN; } \
    static constexpr T max() { return MAX; } \
    static constexpr T lowest() { return LOWEST; } \
    static constexpr T infinity() { return INFINITE; } \
    static constexpr T quiet_NaN() { return QUIET_NAN; } \
    static constexpr T epsilon() { return EPSILON; } \
  };
#define METAL_CPU_INTEGER_LIMITS(T, MIN, MAX, DIGITS) METAL_CPU_LIMITS(T, MIN, MAX, MIN, DIGITS, false, 0, 0, 0)
#define METAL_CPU_FLOAT_LIMITS(T, MIN, MAX, DIGITS, EPSILON) \
  METAL_CPU_LIMITS(T, (T)MIN, (T)MAX, (T)-MAX, DIGITS, true, (T)INFINITY, (T)NAN, (T)EPSILON)
METAL_CPU_INTEGER_LIMITS(bool, false, true, 1)
METAL_CPU_INTEGER_LIMITS(char, -128, 127, 7)
METAL_CPU_INTEGER_LIMITS(int8_t, -128, 127, 7)
METAL_CPU_INTEGER_LIMITS(uchar, 0, 255, 8)
METAL_CPU_INTEGER_LIMITS(short, -32768, 32767, 15)
METAL_CPU_INTEGER_LIMITS(ushort, 0, 65535, 16)
METAL_CPU_INTEGER_LIMITS(int, INT_MIN, INT_MAX, 31)
METAL_CPU_INTEGER_LIMITS(uint, 0, UINT_MAX, 32)
METAL_CPU_INTEGER_LIMITS(long, (-0x7fffffffffffffffL - 1), 0x7fffffffffffffffL, 63)
METAL_CPU_INTEGER_LIMITS(ulong, 0, ~0ul, 64)
METAL_CPU_FLOAT_LIMITS(float, FLT_MIN, FLT_MAX, 24, FLT_EPSILON)
METAL_CPU_FLOAT_LIMITS(half, 6.103515625e-05f, 65504.0f, 11, 9.765625e-04f)
METAL_CPU_FLOAT_LIMITS(bfloat, 1.175494351e-38f, 3.3895314e38f, 8, 7.8125e-03f)

template <class To, class From>
METAL_CPU_INLINE constexpr To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
  return __builtin_bit_cast(To, x);
}

}  // namespace metal

#define METAL_CPU_VECTORS(T) \
  typedef metal::vec<T, 2> T##2; \
  typedef metal::vec<T, 3> T##3; \
  typedef metal::vec<T, 4> T##4; \
  struct packed_##T##2 { \
    T x, y; \
    METAL_CPU_INLINE operator T##2() const { return T##2{x, y}; } \
  }; \
  struct packed_##T##3 { \
    T x, y, z; \
    METAL_CPU_INLINE operator T##3() const { return T##3{x, y, z}; } \
  }; \
  struct packed_##T##4 { \
    T x, y, z, w; \
    METAL_CPU_INLINE operator T##4() const { return T##4{x, y, z, w}; } \
  };
METAL_CPU_VECTORS(float)
METAL_CPU_VECTORS(half)
METAL_CPU_VECTORS(bfloat)
METAL_CPU_VECTORS(char)
METAL_CPU_VECTORS(uchar)
METAL_CPU_VECTORS(short)
METAL_CPU_VECTORS(ushort)
METAL_CPU_VECTORS(int)
METAL_CPU_VECTORS(uint)
METAL_CPU_VECTORS(long)
METAL_CPU_VECTORS(ulong)

namespace metal {
#define METAL_CPU_EXPORT(T) \
  using ::T##2; \
  using ::T##3; \
  using ::T##4;
METAL_CPU_EXPORT(float)
METAL_CPU_EXPORT(half)
METAL_CPU_EXPORT(bfloat)
METAL_CPU_EXPORT(char)
METAL_CPU_EXPORT(uchar)
METAL_CPU_EXPORT(short)
METAL_CPU_EXPORT(ushort)
METAL_CPU_EXPORT(int)
METAL_CPU_EXPORT(uint)
METAL_CPU_EXPORT(long)
METAL_CPU_EXPORT(ulong)
}  // namespace metal
