// SIMD-groups in lock-step, barriers, and the order in which threads run.
//
// A threadgroup runs SIMD-group by SIMD-group. The lanes of a group run one after the other, each to its next
// SIMD-group function, barrier or end; the function is applied once every live lane stands at the same call. Where
// lanes stand at different calls the earliest in the source goes first, helpers in the header before the body, so that
// a diverged branch finishes before what follows it. Then all groups wait at the threadgroup's barrier.
#include "runtime.h"

enum Order { kForward, kReverse, kRandom };
static Order order;
static uint64_t seed;
static void* scheduler_stack;
static void (*kernel_entry)(char** buffers, const Position* position);
static char** kernel_buffers;

static void leave_thread() {
  settle_store();
  Thread* thread = current;
  current = nullptr;
  metal_cpu_switch(&thread->stack_pointer, scheduler_stack);
}

static void stop_launch() {
  stopped = true;
  if (!current) return;
  current->state = State::done;
  leave_thread();
}

static void thread_main() {
  kernel_entry(kernel_buffers, &positions[current_index]);
  current->state = State::done;
  leave_thread();
  __builtin_trap();
}

static void run_until_blocked(uint32_t index) {
  current = &threads[index];
  current_index = index;
  metal_cpu_switch(&scheduler_stack, current->stack_pointer);
}

// ---- what the kernel calls

EXPORT void metal_cpu_simd(const void* in, uint32_t in_size, void* out, uint32_t out_size, uint32_t argument,
                           SimdFunction function, const char* name, const char* file, int line, int column) {
  SimdCall call{in, out, in_size, out_size, argument, function, name};
  current->call = &call;
  current->site = Site{file, line, column};
  current->state = State::at_simd;
  leave_thread();
}

EXPORT void metal_cpu_barrier(int whole_threadgroup, int flags, const char* file, int line, int column) {
  current->call = nullptr;
  current->site = Site{file, line, column};
  current->fences = flags;
  current->state = whole_threadgroup ? State::at_barrier : State::at_simd;
  leave_thread();
}

// ---- orders

static uint32_t random_below(uint32_t n) {
  seed = seed * 6364136223846793005ull + 1442695040888963407ull;
  return (uint32_t)((seed >> 33) % n);
}

static void arrange(uint32_t* items, uint32_t n) {
  for (uint32_t i = 0; i < n; i++) items[i] = order == kReverse ? n - 1 - i : i;
  if (order != kRandom) return;
  for (uint32_t i = n - 1; i > 0 && n; i--) {
    uint32_t j = random_below(i + 1), item = items[i];
    items[i] = items[j], items[j] = item;
  }
}

// ---- one SIMD-group

static bool goes_first(const Site& a, const Site& b) {
  if (in_header(a) != in_header(b)) return in_header(a);
  return a.line != b.line ? a.line < b.line : a.column < b.column;
}

static const char* simd_fault(uint32_t code) {
  switch (code) {
    case 1: return "%s: a lane number is out of range";
    case 2: return "%s reads from an inactive lane, which is undefined";
    case 3: return "%s: the lane number is not the same in all lanes";
    default: return "%s needs all 32 lanes";
  }
}

static void apply(Thread* lanes, uint32_t mask) {
  static char in[kLanes][64] __attribute__((aligned(64))), out[kLanes][64] __attribute__((aligned(64)));
  uint32_t arguments[kLanes] = {}, code = 0;
  const Thread& first = lanes[__builtin_ctz(mask)];
  for (uint32_t i = 0; i < kLanes; i++) {
    if (!(mask >> i & 1)) continue;
    memcpy(in[i], lanes[i].call->in, lanes[i].call->in_size);
    arguments[i] = lanes[i].call->argument;
  }
  first.call->function(mask, in[0], out[0], arguments, &code);
  if (code) {
    char format[96];
    snprintf(format, sizeof format, simd_fault(code), first.call->name);
    fault("simd", first.site, "%s (lanes %08x)", format, mask);
  }
  for (uint32_t i = 0; i < kLanes; i++)
    if (mask >> i & 1) memcpy(lanes[i].call->out, out[i], code == 4 ? 0 : lanes[i].call->out_size);
}

static void complete(uint32_t group, Thread* lanes, uint32_t lane_count) {
  uint32_t live = 0, waiting = 0, together = 0;
  const Thread* first = nullptr;
  for (uint32_t i = 0; i < lane_count; i++) {
    if (lanes[i].state != State::done) live |= 1u << i;
    if (lanes[i].state != State::at_simd) continue;
    waiting |= 1u << i;
    if (!first || goes_first(lanes[i].site, first->site)) first = &lanes[i];
  }
  for (uint32_t i = 0; i < lane_count; i++)
    if ((waiting >> i & 1) && lanes[i].site == first->site && !lanes[i].call == !first->call) together |= 1u << i;
  uint32_t full = lane_count == kLanes ? ~0u : (1u << lane_count) - 1;
  if (together != live) counts.divergent_simd++;
  if (together == live && live != full) counts.partial_simd++;
  if (first->call) {
    counts.simd_operations++;
    apply(lanes, together);
  } else {
    counts.simdgroup_barriers++;
    if (together != full) fault("divergence", first->site, "simdgroup_barrier reached by lanes %08x only", together);
    if (first->fences & 1) device_clock.fence_group(group);
    if (first->fences & 2) threadgroup_clock.fence_group(group);
  }
  for (uint32_t i = 0; i < lane_count; i++)
    if (together >> i & 1) lanes[i].state = State::ready;
}

static void run_group(uint32_t group) {
  Thread* lanes = threads + group * kLanes;
  uint32_t left = thread_count - group * kLanes, lane_count = left < kLanes ? left : kLanes, sequence[kLanes];
  for (;;) {
    arrange(sequence, lane_count);
    for (uint32_t k = 0; k < lane_count; k++) {
      if (lanes[sequence[k]].state != State::ready) continue;
      run_until_blocked(group * kLanes + sequence[k]);
      if (stopped) return;
    }
    bool waiting = false;
    for (uint32_t i = 0; i < lane_count; i++) waiting = waiting || lanes[i].state == State::at_simd;
    if (!waiting) return;
    complete(group, lanes, lane_count);
  }
}

// ---- one threadgroup

// All threads stand at a barrier or have ended; lets them pass. False: all have ended.
static bool pass_barrier() {
  const Thread *first = nullptr, *other = nullptr;
  uint32_t waiting = 0;
  for (uint32_t i = 0; i < thread_count; i++) {
    if (threads[i].state != State::at_barrier) continue;
    waiting++;
    if (!first) first = &threads[i];
    if (!(threads[i].site == first->site)) other = &threads[i];
  }
  if (!first) return false;
  counts.threadgroup_barriers++;
  if (waiting < thread_count)
    fault("divergence", first->site, "threadgroup_barrier reached by %u of %u threads; the others have returned",
          waiting, thread_count);
  if (other)
    fault("divergence", first->site, "threads wait at different threadgroup_barriers, lines %d and %d",
          first->site.line, other->site.line);
  if (first->fences & 1) device_clock.fence_threadgroup();
  if (first->fences & 2) threadgroup_clock.fence_threadgroup();
  for (uint32_t i = 0; i < thread_count; i++)
    if (threads[i].state == State::at_barrier) threads[i].state = State::ready;
  return true;
}

static void run_threadgroup() {
  uint32_t groups = (thread_count + kLanes - 1) / kLanes, sequence[kMaxGroups];
  for (uint32_t i = 0; i < thread_count; i++)
    threads[i] = Thread{fresh_stack(i, thread_main), State::ready, Site{}, nullptr, 0};
  do {
    arrange(sequence, groups);
    for (uint32_t k = 0; k < groups && !stopped; k++) run_group(sequence[k]);
  } while (!stopped && pass_barrier());
}
