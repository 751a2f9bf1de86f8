// Where buffers and threadgroup variables lie: one reserved range of addresses, every part of it
// followed by pages that fault and surrounded by canaries.
#pragma once
#include <sys/mman.h>

#include <algorithm>

#include "state.h"

static const size_t kGroupArea = 128 << 10;  // threadgroup memory, at the start of the arena

static void reserve_arena(const Buffer* buffers, int n) {
  size_t total = kGroupArea + 2 * kGap;
  for (int i = 0; i < n; ++i) total += buffers[i].bytes + 2 * kPage + kGap;
  arena =
      (char*)mmap(nullptr, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (arena == MAP_FAILED) {
    arena = arena_end = nullptr;
    return;
  }
  arena_end = arena + total;
  group_memory = arena + kPage;
  mprotect(group_memory, kGroupArea - 2 * kPage, PROT_READ | PROT_WRITE);
}
// Released after every dispatch: each guard page costs the process one of its 65,530 mappings.
static bool reserve_stacks(size_t n) {
  void* p = mmap(nullptr, n * kStack, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return false;
  stacks = (char*)p, num_stacks = n;
  for (size_t i = 0; i < n; ++i)
    if (mprotect(stacks + i * kStack, kPage, PROT_NONE)) return false;
  return true;
}
static void release_stacks() {
  if (stacks) munmap(stacks, num_stacks * kStack);
  stacks = nullptr, num_stacks = 0;
}
static bool on_stack(uintptr_t address) {
  return address - (uintptr_t)stacks < num_stacks * kStack;
}

template <class T>
static T* zeroed(size_t n) {
  return (T*)mmap(nullptr, (n + 1) * sizeof(T), PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}
template <class T>
static void unmap(T* p, size_t n) {
  if (p) munmap(p, (n + 1) * sizeof(T));
}
static Region map_buffer(const Buffer& b, int id, char*& next) {
  size_t length = std::max((b.bytes + kPage - 1) / kPage * kPage, kPage);
  char* base = next + kGap;
  mprotect(base, length, PROT_READ | PROT_WRITE);
  memset(base, kCanary, length);
  Region r = {};
  r.id = id, r.writable = b.writable, r.name = b.name;
  r.lo = (uintptr_t)base + length - ((b.bytes + 15) & ~15ul);  // the end meets the guard page
  r.hi = r.lo + b.bytes;
  r.map_lo = (uintptr_t)base - kGap / 2, r.map_hi = (uintptr_t)base + length + kGap / 2;
  if (b.writable && !b.initialised)
    memset((void*)r.lo, int(opt.poison), b.bytes);
  else
    memcpy((void*)r.lo, b.host, b.bytes);
  next = base + length;
  return r;
}
static bool canary_intact(uintptr_t lo, uintptr_t hi, const Region& r) {
  auto clean = [](uintptr_t from, uintptr_t to) {
    return std::all_of((uint8_t*)from, (uint8_t*)to, [](uint8_t b) { return b == kCanary; });
  };
  return clean(lo, r.lo) && clean(r.hi, hi);
}
static void drop_group_variables() {
  for (; regions.size() > num_buffers; regions.pop_back())
    unmap(regions.back().cells, regions.back().hi - regions.back().lo);
}
// Storage of the threadgroup variable `id`, made when the first thread comes to its declaration.
extern "C" void* msl_rt_tg(int id, const char* name, unsigned long size, int zero) {
  uint32_t used = 0;
  for (auto& r : regions) {
    if (r.is_group && r.id == id) return (void*)r.lo;
    if (r.is_group) used += uint32_t((r.hi - r.lo + 15) & ~15ul);
  }
  used += uint32_t((size + 15) & ~15ul);
  totals.threadgroup_bytes = std::max(totals.threadgroup_bytes, used);
  if (used > opt.group_memory)
    fail(format("%u bytes of threadgroup memory, the limit is %u (at '%s')", used, opt.group_memory,
                name));
  Region r = {};
  r.id = id, r.writable = r.is_group = true, r.name = name;
  r.map_lo = regions.size() > num_buffers ? regions.back().map_hi : (uintptr_t)group_memory;
  r.lo = r.map_lo + 256, r.hi = r.lo + size, r.map_hi = ((r.hi + 15) & ~15ul) + 256;
  memset((void*)r.map_lo, kCanary, r.map_hi - r.map_lo);
  memset((void*)r.lo, zero ? 0 : int(opt.poison), size);
#ifdef MSL_CHECK
  r.cells = zeroed<Cell>(size);
  for (unsigned long i = 0; zero && i < size; ++i) r.cells[i].flags = 1;  // INITIALISED
#endif
  regions.push_back(r);
  return (void*)r.lo;
}
