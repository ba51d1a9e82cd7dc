// Every load and store of the kernel: bounds, initialisation, alignment, races, bytes.
//
// Kernels are compiled with -fsanitize=thread, and the functions that clang calls for it are these, not those of its
// own runtime. Leaves array indices to undefined.cpp and the race rule to shadow.h.
#include "runtime.h"
#include "shadow.h"

enum : uint8_t { kRead = 1, kWritten = 2, kInitialised = 4 };

// A device buffer or a threadgroup variable.
struct Region {
  char* start;
  uint64_t size;
  const char* name;
  bool in_threadgroup, writable;
  uint8_t* touched = nullptr;  // per byte
  Cell* cells = nullptr;       // per `granule` bytes; nullptr: nobody writes, so nobody races
  uint32_t granule = 1;
  uint64_t read = 0, written = 0;

  const char* space() const { return in_threadgroup ? "threadgroup" : "device"; }
};

constexpr int kMaxRegions = 128;
static Region regions[kMaxRegions];
static int region_count, device_regions;
static Region* last_region;

static void watch(Region& r, uint32_t granule, bool initialised) {
  r.touched = (uint8_t*)calloc(r.size + 1, 1);
  if (initialised) memset(r.touched, kInitialised, r.size);
  r.granule = granule;
  if (r.writable) r.cells = (Cell*)calloc(r.size / granule + 1, sizeof(Cell));
}
static void forget(Region& r) {
  free(r.touched);
  free(r.cells);
  r.touched = nullptr, r.cells = nullptr;
}

// One cell per element is enough until something smaller than an element is accessed.
static void refine(Region& r, uint32_t granule) {
  uint64_t count = r.size / granule + 1, each = r.granule / granule;
  Cell* finer = (Cell*)calloc(count, sizeof(Cell));
  for (uint64_t i = 0; i < count; i++) finer[i] = r.cells[i / each];
  free(r.cells);
  r.cells = finer, r.granule = granule;
}

static Region* find(const char* p) {
  if (last_region && p >= last_region->start && p < last_region->start + last_region->size) return last_region;
  for (int i = region_count - 1; i >= 0; i--)
    if (p >= regions[i].start && p < regions[i].start + regions[i].size) return last_region = &regions[i];
  return nullptr;
}

// ---- races

// A store that conflicts with an earlier store is harmless if it writes what was there already. That is known only once
// it has happened: at the next access, or when the thread stops.
static struct {
  bool waiting;
  char* p;
  uint64_t size;
  char before[16];
  const Region* region;
  uint64_t offset;
  uint32_t thread;
  Conflict conflict;
  Site site;
} pending;

static void report_race(const char* kind, const Region& r, uint64_t offset, uint64_t size, bool write, uint32_t thread,
                        const Conflict& conflict, Site site) {
  counts.races++;
  char other[80] = "several threads";
  if (conflict.one_thread)
    snprintf(other, sizeof other, "thread %u (SIMD-group %u) of threadgroup %u", conflict.thread & 1023,
             conflict.thread >> 5 & 31, conflict.thread >> 10);
  fault(kind, site, "%s of %llu bytes at %s '%s' + %llu by thread %u (SIMD-group %u) of threadgroup %u is not ordered "
        "after a %s by %s", write ? "write" : "read", (unsigned long long)size, r.space(), r.name,
        (unsigned long long)offset, thread & 1023, thread >> 5 & 31, thread >> 10,
        conflict.with_write ? "write" : "read", other);
  set_earlier(conflict.place);
}

static void settle_store() {
  if (!pending.waiting) return;
  pending.waiting = false;
  bool same = !memcmp(pending.p, pending.before, pending.size);
  report_race(same ? "same-value" : "race", *pending.region, pending.offset, pending.size, true, pending.thread,
              pending.conflict, pending.site);
}

static void check_race(Region& r, uint64_t offset, uint64_t size, bool write, bool atomic, Site site) {
  while ((offset | size) & (r.granule - 1)) refine(r, r.granule / 2);
  const Clock& clock = r.in_threadgroup ? threadgroup_clock : device_clock;
  Access access{threadgroup_index << 10 | current_index, clock.group[current_index / kLanes], site.packed(), write,
                atomic};
  Conflict conflict;
  for (uint64_t i = offset / r.granule; i < (offset + size) / r.granule; i++)
    judge(r.cells[i], access, clock, !r.in_threadgroup, conflict);
  if (!conflict.found) return;
  if (write && conflict.with_write && !atomic && size <= sizeof pending.before) {
    pending.waiting = true, pending.p = r.start + offset, pending.size = size, pending.region = &r;
    pending.offset = offset, pending.thread = access.thread, pending.conflict = conflict, pending.site = site;
    memcpy(pending.before, r.start + offset, size);
  } else {
    report_race("race", r, offset, size, write, access.thread, conflict, site);
  }
}

// ---- one access

static void report_outside(const char* p, uint64_t size, bool write, Site site) {
  const char* verb = write ? "write" : "read";
  if (on_any_stack(p)) {
    fault("out-of-bounds", site, "%s of another thread's private memory by %s", verb, thread_name(current_index));
    return;
  }
  const Region* nearest = nullptr;
  int64_t distance = INT64_MAX;
  for (int i = 0; i < region_count; i++) {
    const Region& r = regions[i];
    int64_t d = p < r.start ? r.start - p : p - (r.start + r.size);
    if (d < distance) nearest = &r, distance = d;
  }
  if (!nearest) {
    fault("out-of-bounds", site, "%s of %llu bytes at no buffer's address", verb, (unsigned long long)size);
    return;
  }
  fault("out-of-bounds", site, "%s of %llu bytes at %s '%s' %+lld (it has %llu bytes) by %s", verb,
        (unsigned long long)size, nearest->space(), nearest->name, (long long)(p - nearest->start),
        (unsigned long long)nearest->size, thread_name(current_index));
}

static void check_access(const void* address, uint64_t size, bool write, bool atomic, Site site) {
  const char* p = (const char*)address;
  if (!current || !size || on_stack(current_index, p, size)) return;
  settle_store();
  counts.accesses++;
  Region* r = find(p);
  if (!r || p + size > r->start + r->size) {
    if (!r && !write && p >= image_start && p + size <= image_end) return;
    report_outside(p, size, write, site);
    stop_launch();
    return;
  }
  uint64_t offset = p - r->start;
  (write ? r->written : r->read) += size;
  if (write && !r->writable) {
    fault("read-only", site, "write to input '%s' + %llu", r->name, (unsigned long long)offset);
    stop_launch();
    return;
  }
  uint8_t* touched = r->touched + offset;
  if (write) {
    for (uint64_t i = 0; i < size; i++) touched[i] |= kWritten | kInitialised;
  } else {
    uint8_t all = kInitialised;
    for (uint64_t i = 0; i < size; i++) all &= touched[i], touched[i] |= kRead;
    if (!all)
      fault("uninitialised", site, "read of %llu bytes at %s '%s' + %llu, which nobody has written, by %s",
            (unsigned long long)size, r->space(), r->name, (unsigned long long)offset, thread_name(current_index));
  }
  if (r->cells) check_race(*r, offset, size, write, atomic, site);
}

static void check_aligned(const void* p, uint64_t size, bool write, uint64_t pc) {
  if (!current || !((uint64_t)p & (size - 1))) return;
  fault("misaligned", Site{nullptr, 0, 0, pc}, "%s of %llu bytes at an address that is no multiple of it, by %s",
        write ? "write" : "read", (unsigned long long)size, thread_name(current_index));
  stop_launch();
}

// ---- what the kernel calls

EXPORT void metal_cpu_access(const void* p, uint64_t size, int write, const char* file, int line) {
  if (checked) check_access(p, size, write, false, Site{file, line});
}
EXPORT void metal_cpu_atomic(const void* p, uint64_t size, int reads, int writes, const char* file, int line) {
  counts.atomics++;
  if (checked && reads) check_access(p, size, false, true, Site{file, line});
  if (checked && writes) check_access(p, size, true, true, Site{file, line});
}

#define HERE (Site{nullptr, 0, 0, (uint64_t)__builtin_return_address(0) - 1})
// clang calls the plain functions where the type promises the alignment, the others where it does not.
#define ACCESSORS(N) \
  EXPORT void __tsan_read##N(void* p) { check_aligned(p, N, false, HERE.pc), check_access(p, N, false, false, HERE); } \
  EXPORT void __tsan_write##N(void* p) { check_aligned(p, N, true, HERE.pc), check_access(p, N, true, false, HERE); } \
  EXPORT void __tsan_unaligned_read##N(void* p) { check_access(p, N, false, false, HERE); } \
  EXPORT void __tsan_unaligned_write##N(void* p) { check_access(p, N, true, false, HERE); } \
  EXPORT void __tsan_read_write##N(void* p) { \
    check_aligned(p, N, true, HERE.pc); \
    check_access(p, N, false, false, HERE), check_access(p, N, true, false, HERE); \
  } \
  EXPORT void __tsan_unaligned_read_write##N(void* p) { \
    check_access(p, N, false, false, HERE), check_access(p, N, true, false, HERE); \
  }
ACCESSORS(1)
ACCESSORS(2)
ACCESSORS(4)
ACCESSORS(8)
ACCESSORS(16)
EXPORT void __tsan_init() {}
EXPORT void __tsan_func_entry(void*) {}
EXPORT void __tsan_func_exit() {}
EXPORT void* __tsan_memcpy(void* to, const void* from, size_t size) {
  check_access(from, size, false, false, HERE);
  check_access(to, size, true, false, HERE);
  return memcpy(to, from, size);
}
EXPORT void* __tsan_memmove(void* to, const void* from, size_t size) {
  check_access(from, size, false, false, HERE);
  check_access(to, size, true, false, HERE);
  return memmove(to, from, size);
}
EXPORT void* __tsan_memset(void* to, int value, size_t size) {
  check_access(to, size, true, false, HERE);
  return memset(to, value, size);
}
