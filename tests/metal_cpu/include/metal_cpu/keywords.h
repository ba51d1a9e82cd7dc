// Metal's keywords, constants and literal rules in terms of C++ for OpenCL.
//
// Owns the mapping of address spaces: clang checks __global, __local, __constant and __private as strictly as Metal
// checks device, threadgroup, constant and thread, and on a CPU all of them are plain memory.
#pragma once

#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION cl_khr_fp64 : enable
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable
#pragma OPENCL EXTENSION __cl_clang_variadic_functions : enable

#define device __global
#define threadgroup __local
#define constant __constant
#define thread __private
#define kernel

// Keywords and types of OpenCL that are ordinary names, or names of namespace metal, in Metal.
#define local metal_name_local
#define global metal_name_global
#define generic metal_name_generic
#define pipe metal_name_pipe
#define read_only metal_name_read_only
#define write_only metal_name_write_only
#define read_write metal_name_read_write
#define atomic_int metal_name_atomic_int
#define atomic_uint metal_name_atomic_uint
#define atomic_float metal_name_atomic_float
#define atomic_ulong metal_name_atomic_ulong

#define METAL_CPU_HERE (METAL_CPU_TEXT)__builtin_FILE(), __builtin_LINE(), __builtin_COLUMN()

// nodebug: what the debugger, and so a fault, sees of an inlined helper is the kernel's line that calls it.
#define METAL_CPU_INLINE inline __attribute__((always_inline, nodebug))
// Helpers that handle the runtime's own memory, or that report their accesses themselves.
#define METAL_CPU_UNCHECKED __attribute__((no_sanitize("thread", "undefined"), nodebug))
#define METAL_CPU_TEXT const __constant char*
#define METAL_CPU_SITE_PARAMETERS \
  METAL_CPU_TEXT file = (METAL_CPU_TEXT)__builtin_FILE(), int line = __builtin_LINE(), int column = __builtin_COLUMN()
#define METAL_CPU_SITE file, line, column

#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_CONST constant constexpr
#define __METAL__ 1
#define __METAL_VERSION__ 320
#define __METAL_MACOS__ 1

#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.43429448190325182765f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.78539816339744830962f
#define M_1_PI_F 0.31830988618379067154f
#define M_2_PI_F 0.63661977236758134308f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_huge_valf()
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define HALF_MAX ((half)65504.0f)
#define HALF_MIN ((half)6.103515625e-05f)
#define HALF_EPSILON ((half)9.765625e-04f)
#define CHAR_BIT 8
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 0xffffffffu
#define SHRT_MAX 32767
#define USHRT_MAX 65535
