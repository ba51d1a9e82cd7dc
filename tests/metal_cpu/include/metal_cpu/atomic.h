// Atomic functions: metal_atomic. Threads are fibers of one CPU thread, so plain arithmetic is atomic here; that the
// access was meant to be atomic is what the race check must know.
#pragma once

namespace metal {

enum memory_order {
  memory_order_relaxed,
  memory_order_acquire,
  memory_order_release,
  memory_order_acq_rel,
  memory_order_seq_cst
};

template <class T>
struct atomic {
  static_assert(is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, float> || is_same_v<T, bool> ||
                    is_same_v<T, ulong>,
                "not a type that Metal has atomics of");
  T value;
};
template <class T>
using _atomic = atomic<T>;
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;
typedef atomic<ulong> atomic_ulong;

namespace detail {

struct exchange {
  template <class T>
  METAL_CPU_UNCHECKED static T of(T, T b) { return b; }
};
struct subtract {
  template <class T>
  METAL_CPU_UNCHECKED static T of(T a, T b) { return a - b; }
};

template <class T>
METAL_CPU_UNCHECKED T atomic_load(T* p, METAL_CPU_TEXT file, int line) {
  metal_cpu_atomic(p, sizeof(T), 1, 0, file, line);
  return *p;
}
template <class T>
METAL_CPU_UNCHECKED void atomic_store(T* p, T value, METAL_CPU_TEXT file, int line) {
  metal_cpu_atomic(p, sizeof(T), 0, 1, file, line);
  *p = value;
}
template <class Operation, class T>
METAL_CPU_UNCHECKED T atomic_update(T* p, T value, METAL_CPU_TEXT file, int line) {
  metal_cpu_atomic(p, sizeof(T), 1, 1, file, line);
  T before = *p;
  *p = Operation::of(before, value);
  return before;
}
template <class T>
METAL_CPU_UNCHECKED bool atomic_compare_exchange(T* p, T* expected, T desired, METAL_CPU_TEXT file, int line) {
  metal_cpu_atomic(p, sizeof(T), 1, 1, file, line);
  bool same = *p == *expected;
  if (same) *p = desired;
  if (!same) *expected = *p;
  return same;
}
template <class T, class Operation>
constexpr bool has_atomic = !is_same_v<T, float> || is_same_v<Operation, add> || is_same_v<Operation, subtract> ||
                            is_same_v<Operation, exchange>;

}  // namespace detail

#define METAL_CPU_PLACE METAL_CPU_TEXT file = (METAL_CPU_TEXT)__builtin_FILE(), int line = __builtin_LINE()
#define METAL_CPU_ATOMIC_UPDATE(SPACE, NAME, OPERATION) \
  template <class T> \
  METAL_CPU_INLINE T NAME(volatile SPACE atomic<T>* object, type_identity_t<T> value, memory_order, METAL_CPU_PLACE) { \
    static_assert(detail::has_atomic<T, detail::OPERATION>, "Metal's float atomics only add, subtract and exchange"); \
    return detail::atomic_update<detail::OPERATION, T>((T*)&object->value, value, file, line); \
  }
#define METAL_CPU_ATOMICS(SPACE) \
  template <class T> \
  METAL_CPU_INLINE T atomic_load_explicit(const volatile SPACE atomic<T>* object, memory_order, METAL_CPU_PLACE) { \
    return detail::atomic_load<T>((T*)&object->value, file, line); \
  } \
  template <class T> \
  METAL_CPU_INLINE void atomic_store_explicit(volatile SPACE atomic<T>* object, type_identity_t<T> value, \
                                              memory_order, METAL_CPU_PLACE) { \
    detail::atomic_store<T>((T*)&object->value, value, file, line); \
  } \
  template <class T> \
  METAL_CPU_INLINE bool atomic_compare_exchange_weak_explicit(volatile SPACE atomic<T>* object, thread T* expected, \
                                                              type_identity_t<T> desired, memory_order, memory_order, \
                                                              METAL_CPU_PLACE) { \
    return detail::atomic_compare_exchange<T>((T*)&object->value, expected, desired, file, line); \
  } \
  METAL_CPU_ATOMIC_UPDATE(SPACE, atomic_exchange_explicit, exchange) \
  METAL_CPU_ATOMIC_UPDATE(SPACE, atomic_fetch_add_explicit, add) \
  METAL_CPU_ATOMIC_UPDATE(SPACE, atomic_fetch_sub_explicit, subtract) \
  METAL_CPU_ATOMIC_UPDATE(SPACE, atomic_fetch_max_explicit, maximum) \
  METAL_CPU_ATOMIC_UPDATE(SPACE, atomic_fetch_min_explicit, minimum) \
  METAL_CPU_ATOMIC_UPDATE(SPACE, atomic_fetch_and_explicit, bit_and) \
  METAL_CPU_ATOMIC_UPDATE(SPACE, atomic_fetch_or_explicit, bit_or) \
  METAL_CPU_ATOMIC_UPDATE(SPACE, atomic_fetch_xor_explicit, bit_xor)
METAL_CPU_ATOMICS(device)
METAL_CPU_ATOMICS(threadgroup)

}  // namespace metal
