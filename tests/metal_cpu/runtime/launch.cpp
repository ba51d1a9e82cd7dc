// One launch: buffers between red zones, threadgroup memory, positions, signals; the functions that launch.py calls.
//
// The state is the process's: one launch at a time, which launch.py sees to.
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include "runtime.h"

constexpr uint64_t kRedZone = 64 << 10, kThreadgroupArena = 16 << 20, kThreadgroupGap = 4096;

// As launch.py's Buffer.
struct Buffer {
  char* data;
  uint64_t size;
  const char* name;
  uint32_t element, writable, initialised;
  uint64_t read, read_unique, written, written_unique, unwritten;  // filled here
};

// ---- threadgroup memory: one arena, variables far enough apart that running off one meets nothing

static char *threadgroup_arena, *threadgroup_next;
static Site threadgroup_sites[kMaxRegions];  // of the declaration of the region of the same number

EXPORT void* metal_cpu_threadgroup_variable(const char* name, uint64_t size, uint64_t alignment, const char* file,
                                            int line, int column) {
  Site site{file, line, column};
  for (int i = device_regions; i < region_count; i++)
    if (threadgroup_sites[i] == site && !strcmp(regions[i].name, name)) return regions[i].start;
  uint64_t left = threadgroup_arena + kThreadgroupArena - threadgroup_next;
  if (region_count == kMaxRegions || size + 2 * kThreadgroupGap > left) {
    fault("limit", site, "threadgroup memory beyond what this runner holds, at '%s'", name);
    stop_launch();
  }
  threadgroup_next = (char*)(((uint64_t)threadgroup_next + kThreadgroupGap + 127) & ~127ull);
  threadgroup_sites[region_count] = site;
  Region& r = regions[region_count++];
  r = Region{threadgroup_next, size, name, true, true};
  threadgroup_next += size;
  memset(r.start, 0xff, size);
  if (checked) watch(r, size % 4 || alignment % 4 ? 1 : 4, false);
  counts.threadgroup_bytes = (counts.threadgroup_bytes + alignment - 1) / alignment * alignment + size;
  if (counts.threadgroup_bytes > kThreadgroupLimit)
    fault("limit", site, "%llu bytes of threadgroup memory with '%s'; Metal has %llu",
          (unsigned long long)counts.threadgroup_bytes, name, (unsigned long long)kThreadgroupLimit);
  return r.start;
}

// A new threadgroup finds its memory full of NaN and nobody's.
static void renew_threadgroup_memory() {
  for (int i = device_regions; i < region_count; i++) {
    memset(regions[i].start, 0xff, regions[i].size);
    if (regions[i].touched) memset(regions[i].touched, 0, regions[i].size);
  }
}

// ---- device memory

struct Arena {
  char* start;
  uint64_t size;
};

static uint64_t padded(uint64_t size) { return (size + 255) & ~255ull; }

static Arena place_buffers(Buffer* buffers, int n, char** pointers) {
  Arena arena{nullptr, kRedZone};
  for (int i = 0; i < n; i++) arena.size += padded(buffers[i].size) + kRedZone;
  arena.start = reserve(arena.size);
  char* next = arena.start + kRedZone;
  for (int i = 0; i < n; i++) {
    Buffer& b = buffers[i];
    regions[i] = Region{next, b.size, b.name, false, b.writable != 0};
    memcpy(next, b.data, b.size);
    if (checked) watch(regions[i], b.element > 8 || !b.element ? 1 : b.element, b.initialised);
    pointers[i] = next;
    next += padded(b.size) + kRedZone;
  }
  region_count = device_regions = n;
  return arena;
}

static void collect_buffers(Buffer* buffers, int n) {
  for (int i = 0; i < n; i++) {
    Buffer& b = buffers[i];
    Region& r = regions[i];
    if (b.writable) memcpy(b.data, r.start, b.size);
    b.read = r.read, b.written = r.written;
    b.read_unique = b.written_unique = b.unwritten = 0;
    for (uint64_t k = 0; r.touched && k < b.size; k++) {
      b.read_unique += r.touched[k] & kRead;
      b.written_unique += (r.touched[k] & kWritten) / kWritten;
      b.unwritten += b.writable && !(r.touched[k] & kInitialised);
    }
  }
  for (int i = device_regions; i < region_count; i++) {
    counts.threadgroup_read += regions[i].read;
    counts.threadgroup_written += regions[i].written;
  }
  for (int i = 0; i < region_count; i++) forget(regions[i]);
}

// ---- the kernel's image: its constants may be read, its instructions are numbered from its start

static int find_image(struct dl_phdr_info* info, size_t, void* inside) {
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& segment = info->dlpi_phdr[i];
    const char* start = (const char*)info->dlpi_addr + segment.p_vaddr;
    const char* end = start + segment.p_memsz;
    if (segment.p_type != PT_LOAD || (const char*)inside < start || (const char*)inside >= end) continue;
    image_start = (const char*)info->dlpi_addr;
    image_end = image_start;
    for (int j = 0; j < info->dlpi_phnum; j++) {
      const auto& s = info->dlpi_phdr[j];
      if (s.p_type == PT_LOAD && image_start + s.p_vaddr + s.p_memsz > image_end)
        image_end = image_start + s.p_vaddr + s.p_memsz;
    }
    return 1;
  }
  return 0;
}

// ---- signals: what the checks did not foresee, and the time limit

static pthread_t launching;
static const int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGALRM};
constexpr int kSignalCount = sizeof kSignals / sizeof *kSignals;
static struct sigaction previous_actions[kSignalCount];
static struct itimerval previous_timer;
static stack_t previous_stack;
static int time_limit;

static void on_signal(int signal_number, siginfo_t* info, void*) {
  if (!pthread_equal(pthread_self(), launching)) {
    if (signal_number == SIGALRM) pthread_kill(launching, SIGALRM);
    if (signal_number == SIGALRM) return;
  } else if (signal_number == SIGALRM && !current) {
    stopped = true;
    fault("hang", Site{}, "the launch took longer than %d s", time_limit);
    return;
  } else if (current) {
    const char* p = (const char*)info->si_addr;
    bool overflow = signal_number == SIGSEGV && p < stack_of(current_index) && p >= stack_of(current_index) - kGuard;
    if (signal_number == SIGALRM)
      fault("hang", current->site, "the launch took longer than %d s; %s was running, last seen here", time_limit,
            thread_name(current_index));
    else if (overflow)
      fault("limit", current->site, "more than %d KB of private memory in %s", (int)(kStack >> 10),
            thread_name(current_index));
    else
      fault("crash", current->site, "%s in %s", strsignal(signal_number), thread_name(current_index));
    stop_launch();  // leaves this handler for good: the fiber never runs again
  }
  signal(signal_number, SIG_DFL);
  raise(signal_number);
}

static void catch_signals() {
  static char alternate[64 << 10];
  stack_t stack = {};
  stack.ss_sp = alternate, stack.ss_size = sizeof alternate;
  sigaltstack(&stack, &previous_stack);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  launching = pthread_self();
  for (int i = 0; i < kSignalCount; i++) sigaction(kSignals[i], &action, &previous_actions[i]);
  struct itimerval timer = {};
  timer.it_value.tv_sec = time_limit;
  setitimer(ITIMER_REAL, &timer, &previous_timer);
}

static void release_signals() {
  setitimer(ITIMER_REAL, &previous_timer, nullptr);
  for (int i = 0; i < kSignalCount; i++) sigaction(kSignals[i], &previous_actions[i], nullptr);
  sigaltstack(&previous_stack, nullptr);
}

// ---- launch

// at: the threadgroup's position; full: threads of a threadgroup away from the grid's edge.
static void place_threads(const uint32_t* at, const uint32_t* grid, const uint32_t* full,
                          const uint32_t* threadgroups) {
  uint32_t size[3];
  for (int k = 0; k < 3; k++) {
    uint32_t left = grid[k] - at[k] * full[k];
    size[k] = left < full[k] ? left : full[k];
  }
  thread_count = size[0] * size[1] * size[2];
  for (uint32_t i = 0; i < thread_count; i++) {
    Position& p = positions[i];
    uint32_t own[3] = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
    for (int k = 0; k < 3; k++) {
      p.in_threadgroup[k] = own[k], p.in_grid[k] = at[k] * full[k] + own[k], p.threadgroup[k] = at[k];
      p.grid[k] = grid[k], p.threadgroups[k] = threadgroups[k], p.threads[k] = size[k], p.dispatched[k] = full[k];
    }
    p.index = i, p.lane = i % kLanes, p.group = i / kLanes;
    p.groups = (thread_count + kLanes - 1) / kLanes;
    p.dispatched_groups = (full[0] * full[1] * full[2] + kLanes - 1) / kLanes;
  }
}

// Runs the kernel over the grid; returns the number of faults. grid, threadgroup: threads, as dispatchThreads takes.
EXPORT int metal_cpu_launch(void* entry, const uint32_t* grid, const uint32_t* threadgroup, Buffer* buffers, int n,
                            int check, int how, uint64_t random_seed, int limit_seconds, Counts* out) {
  make_stacks();
  if (!threadgroup_arena) threadgroup_arena = reserve(kThreadgroupArena);
  counts = Counts{}, fault_count = 0, stopped = false, pending.waiting = false, last_region = nullptr;
  checked = check, order = (Order)how, seed = random_seed, time_limit = limit_seconds;
  device_clock = Clock{}, threadgroup_clock = Clock{}, threadgroup_index = 0;
  threadgroup_next = threadgroup_arena;
  image_start = image_end = nullptr;
  dl_iterate_phdr(find_image, entry);

  char* pointers[kMaxRegions];
  kernel_entry = (void (*)(char**, const Position*))entry;
  kernel_buffers = pointers;
  Arena arena = place_buffers(buffers, n, pointers);

  uint32_t full[3], threadgroups[3], total = 1;
  for (int k = 0; k < 3; k++) {
    full[k] = threadgroup[k] < grid[k] ? threadgroup[k] : grid[k];
    threadgroups[k] = (grid[k] + full[k] - 1) / full[k];
    total *= threadgroups[k];
  }
  uint32_t* sequence = (uint32_t*)malloc(total * sizeof(uint32_t));
  arrange(sequence, total);
  catch_signals();
  for (uint32_t k = 0; k < total && !stopped; k++) {
    uint32_t i = sequence[k], row = threadgroups[0], plane = threadgroups[0] * threadgroups[1];
    uint32_t at[3] = {i % row, i % plane / row, i / plane};
    place_threads(at, grid, full, threadgroups);
    renew_threadgroup_memory();
    threadgroup_index = i;
    device_clock.fence_threadgroup();
    threadgroup_clock.fence_threadgroup();
    run_threadgroup();
    counts.threadgroups++;
    counts.threads += thread_count;
  }
  current = nullptr;
  release_signals();
  free(sequence);
  collect_buffers(buffers, n);
  munmap(arena.start, arena.size);
  for (int i = 0; i < fault_count; i++)
    if (faults[i].pc) faults[i].pc -= (uint64_t)image_start;
  *out = counts;
  return fault_count;
}
