// Every load and store of the check build: bounds, unwritten memory, races. Clang's thread
// sanitizer inserts the calls __tsan_*; what they do is ours.
#pragma once
#include "counters.h"
#include "memory.h"
#include "schedule.h"

enum {  // Cell::flags
  INITIALISED = 1,
  WRITTEN = 2,
  WRITTEN_ATOMIC = 4,
  READ = 8,
  READ_ATOMIC = 16,
  READ_BY_MANY = 32,        // threads, since the last barrier
  READ_BY_SIMDGROUPS = 64,  // more than one, since the last barrier
  READ_BY_GROUPS = 128,     // more than one threadgroup
};

// Writes over another thread's write, until it is known whether they change the value.
struct Overwrite {
  uintptr_t address;
  uint8_t before;
  void* pc;
  std::string text;
};
static std::vector<Overwrite> overwrites;
static void judge_overwrites() {
  for (auto& o : overwrites)
    report(*(uint8_t*)o.address == o.before ? "same-value write/write" : "race write/write", o.pc,
           o.text);
  overwrites.clear();
}

struct Access {
  const Region& region;
  const Thread& thread;
  uint32_t epoch,
      sub;  // barriers passed that order this memory, in the threadgroup, in the simdgroup
  bool atomic;
  void* pc;
  // Has a barrier come between that access (of threadgroup g, thread t, at its epochs) and this
  // one?
  bool ordered(uint32_t g, uint16_t t, uint32_t its_epoch, uint32_t its_sub) const {
    return g == group && (t == thread.index || its_epoch != epoch ||
                          (t / 32u == thread.simdgroup && its_sub != sub));
  }
  std::string story(uintptr_t address, const char* did, uint32_t tid, uint32_t g,
                    const char* does) const {
    return place(region, address) +
           format(": %s by thread %u of group %u, %s by ", did, tid, g, does) + who(thread) +
           " with no barrier between";
  }
  void read(Cell& c, uintptr_t address) const {
    if ((c.flags & WRITTEN) && !ordered(c.write_group, c.writer, c.write_epoch, c.write_sub) &&
        !(atomic && (c.flags & WRITTEN_ATOMIC)))
      report("race write/read", pc, story(address, "written", c.writer, c.write_group, "read"));
    if (!(c.flags & INITIALISED))
      report("uninitialised read", pc,
             place(region, address) + " read before it was written, by " + who(thread));
    const bool seen = c.flags & READ, same_group = c.read_group == group;
    if (seen && !same_group) c.flags |= READ_BY_GROUPS;
    if (seen && same_group && c.read_epoch == epoch) {
      if (c.reader != thread.index) c.flags |= READ_BY_MANY;
      if (c.reader / 32u != thread.simdgroup) c.flags |= READ_BY_SIMDGROUPS;
    } else {
      c.flags &= uint8_t(~(READ_BY_MANY | READ_BY_SIMDGROUPS));
    }
    c.flags = uint8_t((c.flags & ~READ_ATOMIC) | READ | (atomic ? READ_ATOMIC : 0));
    c.read_group = group, c.reader = uint16_t(thread.index), c.read_epoch = epoch, c.read_sub = sub;
  }
  void write(Cell& c, uintptr_t address) const {
    if ((c.flags & WRITTEN) && !ordered(c.write_group, c.writer, c.write_epoch, c.write_sub) &&
        !(atomic && (c.flags & WRITTEN_ATOMIC))) {
      std::string text = story(address, "written", c.writer, c.write_group, "written");
      if (atomic)
        report("race write/write", pc, text);
      else if (overwrites.size() < 64)
        overwrites.push_back({address, *(uint8_t*)address, pc, text});
    }
    if ((c.flags & READ) && !(atomic && (c.flags & READ_ATOMIC))) {
      bool race = (c.flags & READ_BY_GROUPS) || c.read_group != group;
      if (!race && c.read_epoch == epoch)
        race = (c.flags & READ_BY_SIMDGROUPS) || ((c.flags & READ_BY_MANY) && c.read_sub == sub) ||
               !ordered(c.read_group, c.reader, c.read_epoch, c.read_sub);
      if (race)
        report("race read/write", pc, story(address, "read", c.reader, c.read_group, "written"));
    }
    c.flags = uint8_t(INITIALISED | WRITTEN | (atomic ? WRITTEN_ATOMIC : 0));
    c.write_group = group, c.writer = uint16_t(thread.index), c.write_epoch = epoch,
    c.write_sub = sub;
  }
};

__attribute__((noinline)) static void access(uintptr_t address, unsigned n, bool is_write,
                                             bool atomic, void* pc) {
  if (!running) return;
  const Thread& t = fibers[current].thread;
  if (on_stack(address)) {
    if ((address - (uintptr_t)stacks) / kStack != current)
      report("foreign-stack", pc, who(t) + " touches another thread's local memory");
    return;
  }
  if (address - (uintptr_t)arena >= size_t(arena_end - arena))
    return;  // the kernel's own constants
  if (!overwrites.empty()) judge_overwrites();
  Region* r = region_of(address);
  if (!r || address < r->lo || address + n > r->hi)
    fail(format("out-of-bounds %s of %u bytes ", is_write ? "write" : "read", n) + at(pc) + ": " +
         (r ? place(*r, address) : "far from any buffer") + ", " + who(t));
  if (is_write && !r->writable)
    fail("write to the input " + place(*r, address) + " " + at(pc) + ", " + who(t));
  if (opt.count && !r->is_group) count_access(*r, address, n, is_write, pc);
  if (!r->cells) return;
  const Simdgroup& s = simdgroups[t.simdgroup];
  const Access a = {
      *r,     t, r->is_group ? epoch_group : epoch_dev, r->is_group ? s.epoch_group : s.epoch_dev,
      atomic, pc};
  for (unsigned i = 0; i < n; ++i) {
    Cell& c = r->cells[address - r->lo + i];
    is_write ? a.write(c, address + i) : a.read(c, address + i);
  }
}

#define MSL_PC __builtin_return_address(0)
#define MSL_ACCESS(n)                                                                       \
  void __tsan_read##n(void* p) { access((uintptr_t)p, n, false, false, MSL_PC); }           \
  void __tsan_write##n(void* p) { access((uintptr_t)p, n, true, false, MSL_PC); }           \
  void __tsan_unaligned_read##n(void* p) { access((uintptr_t)p, n, false, false, MSL_PC); } \
  void __tsan_unaligned_write##n(void* p) { access((uintptr_t)p, n, true, false, MSL_PC); }
extern "C" {
MSL_ACCESS(1) MSL_ACCESS(2) MSL_ACCESS(4) MSL_ACCESS(8) MSL_ACCESS(16) void __tsan_init() {}
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  access((uintptr_t)from, unsigned(n), false, false, MSL_PC);
  access((uintptr_t)to, unsigned(n), true, false, MSL_PC);
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
  access((uintptr_t)from, unsigned(n), false, false, MSL_PC);
  access((uintptr_t)to, unsigned(n), true, false, MSL_PC);
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
  access((uintptr_t)to, unsigned(n), true, false, MSL_PC);
  return memset(to, value, n);
}
void msl_rt_atomic(const volatile void* p, unsigned n, void* pc) {
  access((uintptr_t)p, n, true, true, pc);
}
// clang's minimal undefined behaviour runtime
#define MSL_UNDEFINED(handler, text)                                  \
  [[noreturn]] void __ubsan_handle_##handler##_minimal_abort() {      \
    fail(text " " + at(MSL_PC) + ", " + who(fibers[current].thread)); \
  }
MSL_UNDEFINED(add_overflow, "integer overflow")
MSL_UNDEFINED(sub_overflow, "integer overflow")
MSL_UNDEFINED(mul_overflow, "integer overflow")
MSL_UNDEFINED(negate_overflow, "integer overflow")
MSL_UNDEFINED(divrem_overflow, "integer division by zero")
MSL_UNDEFINED(out_of_bounds, "array index outside its declared size")
MSL_UNDEFINED(type_mismatch, "misaligned access")
}
