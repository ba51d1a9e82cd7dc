// The list of what went wrong in one launch: one entry per kind and place.
#include "runtime.h"

struct Fault {
  char kind[24], message[360], file[160];
  int line;
  uint64_t pc;
  uint32_t earlier;  // of a race: the other access, as Site::packed; 0: none
};

constexpr int kMaxFaults = 64;
static Fault faults[kMaxFaults];
static int fault_count;
static Fault* newest;  // the last call's entry, if it made one

static void fault(const char* kind, Site site, const char* format, ...) {
  newest = nullptr;
  for (int i = 0; i < fault_count; i++) {
    const Fault& f = faults[i];
    if (!strcmp(f.kind, kind) && f.line == site.line && f.pc == site.pc) return;
  }
  if (fault_count == kMaxFaults) return;
  Fault& f = *(newest = &faults[fault_count++]);
  snprintf(f.kind, sizeof f.kind, "%s", kind);
  snprintf(f.file, sizeof f.file, "%s", site.file ? site.file : "");
  f.line = site.line;
  f.pc = site.pc;
  f.earlier = 0;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(f.message, sizeof f.message, format, arguments);
  va_end(arguments);
}

static void set_earlier(uint32_t place) {
  if (newest) newest->earlier = place;
}

// "thread (x, y, z) of threadgroup (x, y, z)"; good until the fourth call after this one.
static const char* thread_name(uint32_t index) {
  static char names[4][80];
  static int next;
  char* name = names[next++ & 3];
  const uint32_t *t = positions[index].in_threadgroup, *g = positions[index].threadgroup;
  snprintf(name, sizeof names[0], "thread (%u, %u, %u) of threadgroup (%u, %u, %u)", t[0], t[1], t[2], g[0], g[1],
           g[2]);
  return name;
}

EXPORT int metal_cpu_fault(int i, const char** kind, const char** message, const char** file, uint64_t* pc,
                           uint32_t* earlier) {
  const Fault& f = faults[i];
  *kind = f.kind, *message = f.message, *file = f.file, *pc = f.pc, *earlier = f.earlier;
  return f.line;
}
