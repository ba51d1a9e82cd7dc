// The race rule: what is remembered of one memory cell, and whether an access is ordered after the earlier ones.
//
// A thread's id is threadgroup << 10 | index. Remembered are the last write and a summary of the reads since the last
// fence, which suffices: a write or read that is ordered after the last write is ordered after all before it.
#pragma once
#include "runtime.h"

struct Access {
  uint32_t thread, stamp;  // stamp: the Clock's group[] of its SIMD-group at that time
  uint32_t place;          // Site::packed
  bool write, atomic;
};

struct Conflict {
  bool found = false, with_write = false, one_thread = false;
  uint32_t thread = 0, place = 0;
};

struct Cell {
  uint32_t writer, write_stamp, write_place, reader, read_stamp, read_place;
  uint8_t written : 1, write_atomic : 1, read : 1, reads_atomic : 1;
  uint8_t many_threads : 1;       // several threads of the reader's SIMD-group have read
  uint8_t many_groups : 1;        // several SIMD-groups of its threadgroup
  uint8_t many_threadgroups : 1;  // several threadgroups
};

static bool same_group(uint32_t a, uint32_t b) { return a >> 5 == b >> 5; }
static bool same_threadgroup(uint32_t a, uint32_t b) { return a >> 10 == b >> 10; }

// `across`: whether other threadgroups reach this memory, too.
static bool unordered(uint32_t earlier, uint32_t stamp, uint32_t now, const Clock& clock, bool across) {
  if (!same_threadgroup(earlier, now)) return across;
  return stamp >= (same_group(earlier, now) ? clock.group[now >> 5 & (kMaxGroups - 1)] : clock.threadgroup);
}

static void judge(Cell& c, const Access& a, const Clock& clock, bool across, Conflict& conflict) {
  if (c.written && c.writer != a.thread && !(a.atomic && c.write_atomic) &&
      unordered(c.writer, c.write_stamp, a.thread, clock, across)) {
    conflict.found = conflict.with_write = conflict.one_thread = true;
    conflict.thread = c.writer, conflict.place = c.write_place;
  }
  bool reads_here = c.read && same_threadgroup(c.reader, a.thread);
  bool reads_live = reads_here && c.read_stamp >= clock.threadgroup;
  if (a.write) {
    if (c.read && !(a.atomic && c.reads_atomic) && !conflict.found) {
      bool others = across && (c.many_threadgroups || !reads_here);
      bool group = reads_live && (c.many_groups || !same_group(c.reader, a.thread));
      bool lanes = reads_live && !group && (c.many_threads || c.reader != a.thread) &&
                   unordered(c.reader, c.read_stamp, a.thread, clock, across);
      conflict.found = others || group || lanes;
      conflict.one_thread = !c.many_threads && !c.many_groups && !c.many_threadgroups;
      conflict.thread = c.reader, conflict.place = c.read_place;
    }
    c.writer = a.thread, c.write_stamp = a.stamp, c.write_place = a.place;
    c.written = 1, c.write_atomic = a.atomic;
    return;
  }
  if (reads_live) {
    bool same = same_group(c.reader, a.thread);
    if (!same) c.many_groups = 1;
    if (same && c.read_stamp == a.stamp && c.reader != a.thread) c.many_threads = 1;
    if (same && c.read_stamp != a.stamp) {
      c.reader = a.thread, c.read_stamp = a.stamp, c.read_place = a.place;
      c.many_threads = 0;
    }
    c.reads_atomic = c.reads_atomic && a.atomic;
    return;
  }
  if (across && c.read && !reads_here) c.many_threadgroups = 1;
  c.reads_atomic = a.atomic && (!c.many_threadgroups || c.reads_atomic);
  c.reader = a.thread, c.read_stamp = a.stamp, c.read_place = a.place;
  c.read = 1, c.many_threads = c.many_groups = 0;
}
