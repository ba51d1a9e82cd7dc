// What a compiled kernel calls in the runtime. The other side of each is in ../../runtime/.
#pragma once

// One SIMD-group operation over the lanes of `mask`: `in` and `out` hold 32 slots of 64 bytes, `argument` one number
// per lane. A problem is left in *fault (see simd_fault in runtime.h).
typedef void (*metal_cpu_simd_function)(unsigned mask, const char* in, char* out, const unsigned* argument,
                                        unsigned* fault);

extern "C" {
void metal_cpu_simd(const void* in, unsigned in_size, void* out, unsigned out_size, unsigned argument,
                    metal_cpu_simd_function function, METAL_CPU_TEXT name, METAL_CPU_TEXT file, int line, int column);
void metal_cpu_barrier(int whole_threadgroup, int flags, METAL_CPU_TEXT file, int line, int column);
void* metal_cpu_threadgroup_variable(METAL_CPU_TEXT name, unsigned long size, unsigned long alignment,
                                     METAL_CPU_TEXT file, int line, int column);
void metal_cpu_access(const void* address, unsigned long size, int write, METAL_CPU_TEXT file, int line);
void metal_cpu_atomic(const void* address, unsigned long size, int reads, int writes, METAL_CPU_TEXT file, int line);
}

// Where a thread stands in the grid; filled by runtime/launch.cpp, read by the generated entry point.
struct metal_cpu_thread {
  unsigned position_in_grid[3], position_in_threadgroup[3], threadgroup_in_grid[3];
  unsigned grid[3], threadgroups[3];
  unsigned threads[3];     // of this threadgroup, which may be a smaller one at the grid's edge
  unsigned dispatched[3];  // of a full threadgroup
  unsigned index, lane, simdgroup, simdgroups, dispatched_simdgroups;
};
