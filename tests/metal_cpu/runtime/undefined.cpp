// Array indices, overflow, division, conversions: the functions that clang's -fsanitize checks call.
//
// Every one gets a block that starts with the place in the source, then the operands.
#include "runtime.h"

struct UndefinedPlace {
  const char* file;
  uint32_t line, column;
};

static void undefined(const char* kind, const UndefinedPlace* place, bool stop, const char* format, uint64_t a,
                      uint64_t b) {
  char message[200];
  snprintf(message, sizeof message, format, (long long)a, (long long)b);
  fault(kind, Site{place->file, (int)place->line}, "%s, by %s", message, thread_name(current_index));
  if (stop) stop_launch();
}

#define UNDEFINED(NAME, KIND, STOP, FORMAT) \
  EXPORT void __ubsan_handle_##NAME(const UndefinedPlace* place, uint64_t a, uint64_t b) { \
    undefined(KIND, place, STOP, FORMAT, a, b); \
  }
UNDEFINED(out_of_bounds, "out-of-bounds", true, "index %lld of an array of fixed size")
UNDEFINED(add_overflow, "undefined", false, "signed overflow: %lld + %lld")
UNDEFINED(sub_overflow, "undefined", false, "signed overflow: %lld - %lld")
UNDEFINED(mul_overflow, "undefined", false, "signed overflow: %lld * %lld")
UNDEFINED(negate_overflow, "undefined", false, "signed overflow: -(%lld)")
UNDEFINED(divrem_overflow, "undefined", true, "integer division of %lld by %lld")
UNDEFINED(shift_out_of_bounds, "undefined", false, "shift of %lld by %lld")
UNDEFINED(float_cast_overflow, "undefined", false, "the integer type cannot hold this float")
UNDEFINED(load_invalid_value, "undefined", false, "a bool that is neither 0 nor 1: %lld")
UNDEFINED(type_mismatch_v1, "misaligned", true, "access through the misaligned or null pointer 0x%llx")
UNDEFINED(builtin_unreachable, "undefined", true, "a place that cannot be reached was reached")

// -fsanitize=local-bounds: pointers into private arrays. No place in the source comes along.
EXPORT void __ubsan_handle_local_out_of_bounds() {
  fault("out-of-bounds", Site{nullptr, 0, 0, (uint64_t)__builtin_return_address(0) - 1},
        "access beyond a private array by %s", thread_name(current_index));
  stop_launch();
}

// The rounding from float to bfloat, which the compiler expects from its own runtime library.
EXPORT __bf16 __truncsfbf2(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  uint16_t half = nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  __bf16 rounded;
  memcpy(&rounded, &half, 2);
  return rounded;
}
