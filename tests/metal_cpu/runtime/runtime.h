// What the files of the runtime share. They are compiled as one unit (runtime.cpp), without exceptions, without the
// C++ library, and without instrumentation.
//
//   fibers.cpp        a stack per Metal thread and the switch between them
//   faults.cpp        the list of what went wrong
//   shadow.h          the race rule of one memory cell
//   memory_check.cpp  every load and store of the kernel: bounds, initialisation, races, bytes
//   undefined.cpp     array indices, overflow, division: clang's undefined-behaviour handlers
//   scheduler.cpp     SIMD-groups in lock-step, barriers, orders
//   launch.cpp        buffers, threadgroups, signals, the functions that launch.py calls
#pragma once

#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

constexpr uint32_t kLanes = 32, kMaxThreads = 1024, kMaxGroups = kMaxThreads / kLanes;
constexpr uint64_t kThreadgroupLimit = 32768;  // bytes, of every Apple GPU

struct Site {
  const char* file = nullptr;
  int line = 0, column = 0;
  uint64_t pc = 0;  // instead of file and line, where only the instruction is known

  // In 32 bits: for one place per memory cell.
  uint32_t packed() const;
  bool operator==(const Site& other) const {
    return file == other.file && line == other.line && column == other.column;
  }
};

// As metal_cpu_thread in include/metal_cpu/runtime_calls.h.
struct Position {
  uint32_t in_grid[3], in_threadgroup[3], threadgroup[3], grid[3], threadgroups[3], threads[3], dispatched[3];
  uint32_t index, lane, group, groups, dispatched_groups;
};

typedef void (*SimdFunction)(uint32_t mask, const char* in, char* out, const uint32_t* argument, uint32_t* fault);

struct SimdCall {
  const void* in;
  void* out;
  uint32_t in_size, out_size, argument;
  SimdFunction function;
  const char* name;
};

enum class State : uint8_t { ready, at_simd, at_barrier, done };

struct Thread {
  void* stack_pointer;
  State state;
  Site site;             // of the call that the thread waits in
  const SimdCall* call;  // nullptr: a barrier
  int fences;            // of that barrier: 1 device, 2 threadgroup
};

// The same order as launch.py's COUNTS.
struct Counts {
  uint64_t threads, threadgroups, simd_operations, divergent_simd, partial_simd, threadgroup_barriers,
      simdgroup_barriers, accesses, atomics, races, threadgroup_bytes, threadgroup_read, threadgroup_written;
};

// Fences so far. Of two accesses by one threadgroup the later one is ordered after the earlier if a fence that covers
// both stands between: its stamp is older than `threadgroup`, or than `group[g]` if both are of SIMD-group g.
struct Clock {
  uint32_t now = 1, threadgroup = 1, group[kMaxGroups] = {};
  void fence_threadgroup() {
    threadgroup = ++now;
    for (uint32_t& stamp : group) stamp = now;
  }
  void fence_group(uint32_t g) { group[g] = ++now; }
};

// Address space that becomes memory where it is used.
static char* reserve(uint64_t size) {
  return (char*)mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static Thread threads[kMaxThreads];
static Position positions[kMaxThreads];
static Thread* current;      // nullptr: the scheduler itself runs
static uint32_t current_index, thread_count, threadgroup_index;
static Clock device_clock, threadgroup_clock;
static Counts counts;
static bool checked, stopped;

static const char *image_start, *image_end;  // the kernel's own code and constants

static bool in_header(const Site& site) { return site.file && !strcmp(site.file, "header"); }

// An instruction, counted from the image's start; or, with the highest bit, a line of the header (next bit) or body.
inline uint32_t Site::packed() const {
  return pc ? (uint32_t)(pc - (uint64_t)image_start) : 1u << 31 | (uint32_t)in_header(*this) << 30 | (uint32_t)line;
}

static void fault(const char* kind, Site site, const char* format, ...) __attribute__((format(printf, 3, 4)));
static void settle_store();       // memory_check.cpp: judges a store that conflicted, now that it has happened
static void leave_thread();       // scheduler.cpp: back to the scheduler
static void stop_launch();        // after a fault that leaves nothing sensible to run
