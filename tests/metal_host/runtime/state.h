// What one dispatch consists of. Everything is static: one dispatch runs at a time, on one thread.
#pragma once
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <string>
#include <vector>

// ---- shared with run.py (same order, same sizes)
struct Buffer {
  void* host;
  uint64_t bytes;
  uint32_t writable, initialised;
  const char* name;
  uint8_t* written;  // check build, may be null: by byte, 0 where nothing has written it yet
};
struct Options {
  uint32_t grid[3], group[3];
  uint32_t
      lenient;     // 1: simd operations work on the lanes that came, 0: a missing lane is an error
  uint32_t order;  // of lanes and threadgroups: 0 forward, 1 backward, 2 shuffled by seed
  uint64_t seed;
  uint32_t poison;        // byte that fills outputs and threadgroup memory
  uint32_t group_memory;  // most bytes of threadgroup memory
  uint32_t count;         // 1: fill Traffic (check build only)
  double timeout;         // CPU seconds
};
struct Totals {
  uint64_t groups, threads, simd_ops, barriers, unwritten;
  uint32_t threadgroup_bytes, reports;
};
struct Traffic {  // of one buffer
  uint64_t loads, bytes, distinct, lines, stored;
};

// ---- handed to the kernel by the generated entry (same order as in source.py)
struct Thread {
  uint32_t in_grid[3], in_group[3], group_pos[3], group_size[3], full_group[3], grid[3], groups[3];
  uint32_t index, lane, simdgroup, simdgroups, full_simdgroups;
};

typedef void (*Combine)(const void* const* in, void* const* out, unsigned lanes, const void* ctx);

enum State { READY, AT_SIMD, AT_BARRIER, DONE };
struct Fiber {  // one thread of the running threadgroup
  void* sp;
  State state;
  const char* op;  // where it waits, and with what
  void* site;
  const void* in;
  void* out;
  Combine combine;
  const void* ctx;
  Thread thread;
};
struct Simdgroup {
  uint32_t lanes, arrived, done;    // masks
  uint32_t epoch_group, epoch_dev;  // simdgroup_barriers passed, by the memory they order
};
// What is known about one byte: who wrote and who read it last, and since when.
struct Cell {
  uint32_t write_epoch, write_sub, read_epoch, read_sub, write_group, read_group;
  uint16_t writer, reader;
  uint8_t flags;
};
struct Region {  // a buffer, or a threadgroup variable of the running threadgroup
  uintptr_t lo, hi;
  int id;
  bool writable, is_group;
  std::string name;
  Cell* cells;    // null: not tracked
  uint8_t* read;  // a byte for every byte of a buffer: loaded at least once (when counting)
  uintptr_t map_lo, map_hi;  // addresses that are blamed on this region
};
struct Report {
  const char* kind;
  void* pc;
  uint64_t count;
  std::string text;
};

const size_t kStack = 256 << 10, kPage = 4096, kGap = size_t(1) << 29, kLine = 128;
const uint8_t kCanary = 0xA5;

static std::vector<Fiber> fibers;
static std::vector<Simdgroup> simdgroups;
static std::vector<Region> regions;  // the buffers, then the threadgroup variables
static size_t num_buffers;
static std::vector<Report> reports;
static std::vector<Traffic> traffic;
static Options opt;
static Totals totals;
static uint32_t current, group, num_threads;
static uint32_t epoch_group, epoch_dev;  // threadgroup_barriers passed, by the memory they order
static bool running, failed;
static std::string failure;
static void *main_sp, *module_base;
static char *stacks, *arena, *arena_end, *group_memory;
static size_t num_stacks;

extern "C" void msl_switch(void** save, void* to);

__attribute__((format(printf, 1, 2))) static std::string format(const char* f, ...) {
  char text[1024];
  va_list args;
  va_start(args, f);
  vsnprintf(text, sizeof text, f, args);
  va_end(args);
  return text;
}
static std::string at(const void* pc) {  // run.py turns this into file:line
  return format("@%#lx", (unsigned long)((uintptr_t)pc - (uintptr_t)module_base));
}
static std::string who(const Thread& t) {
  return format("thread (%u,%u,%u) of threadgroup (%u,%u,%u) [simdgroup %u lane %u]", t.in_group[0],
                t.in_group[1], t.in_group[2], t.group_pos[0], t.group_pos[1], t.group_pos[2],
                t.simdgroup, t.lane);
}
static std::string place(const Region& r, uintptr_t address) {
  return format("%s '%s' byte %ld of %lu", r.is_group ? "threadgroup variable" : "buffer",
                r.name.c_str(), long(address - r.lo), (unsigned long)(r.hi - r.lo));
}
static Region* region_of(uintptr_t address) {
  for (auto& r : regions)
    if (address >= r.map_lo && address < r.map_hi) return &r;
  return nullptr;
}
static void report(const char* kind, void* pc, const std::string& text) {
  for (auto& r : reports)
    if (r.pc == pc && !strcmp(r.kind, kind)) {
      ++r.count;
      return;
    }
  if (reports.size() < 64) reports.push_back({kind, pc, 1, text});
}
[[noreturn]] static void fail(const std::string& text) {  // ends the dispatch
  failed = true;
  failure = text;
  void* unused;
  msl_switch(&unused, main_sp);
  __builtin_unreachable();
}
