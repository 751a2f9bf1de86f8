// Traffic of every buffer. A simdgroup load is what the lanes of one simdgroup load at the same
// place of the program, the same number of times since they last met at a simd operation or a
// barrier; a byte that several of its lanes load counts once, and its cache lines are those of 128
// bytes.
#pragma once
#include <algorithm>

#include "memory.h"
#include "schedule.h"

struct Load {
  void* pc;
  uint32_t nth;  // time that this lane came to `pc` since the last sync
  int region;
  uint64_t offset;
  uint32_t bytes;
};
static std::vector<std::vector<Load>> loads;  // by thread of the threadgroup

static void count_access(Region& r, uintptr_t address, unsigned n, bool is_write, void* pc) {
  if (is_write) {
    traffic[r.id].stored += n;
    return;
  }
  loads[current].push_back({pc, 0, r.id, address - r.lo, n});
  memset(r.read + (address - r.lo), 1, n);
}

static void end_of_sync(uint32_t simdgroup) {
  if (!opt.count) return;
  static std::vector<Load> all;
  all.clear();
  for (uint32_t i = simdgroup * 32; i < std::min(simdgroup * 32 + 32, num_threads); ++i) {
    auto& lane = loads[i];
    std::stable_sort(lane.begin(), lane.end(),
                     [](const Load& a, const Load& b) { return a.pc < b.pc; });
    for (size_t k = 1; k < lane.size(); ++k)
      lane[k].nth = lane[k].pc == lane[k - 1].pc ? lane[k - 1].nth + 1 : 0;
    all.insert(all.end(), lane.begin(), lane.end());
    lane.clear();
  }
  auto together = [](const Load& a, const Load& b) {
    return a.pc == b.pc && a.nth == b.nth && a.region == b.region;
  };
  std::sort(all.begin(), all.end(), [&](const Load& a, const Load& b) {
    if (a.pc != b.pc) return a.pc < b.pc;
    if (a.nth != b.nth) return a.nth < b.nth;
    if (a.region != b.region) return a.region < b.region;
    return a.offset < b.offset;
  });
  uint64_t end = 0,
           line_end = 0;  // first byte and line that this simdgroup load has not touched yet
  for (size_t k = 0; k < all.size(); ++k) {
    const Load& l = all[k];
    Traffic& t = traffic[l.region];
    if (!k || !together(all[k - 1], l)) ++t.loads, end = line_end = 0;
    const uint64_t stop = l.offset + l.bytes, line_stop = (stop - 1) / kLine + 1;
    if (stop > end) t.bytes += stop - std::max(end, l.offset);
    if (line_stop > line_end) t.lines += line_stop - std::max(line_end, l.offset / kLine);
    end = std::max(end, stop), line_end = std::max(line_end, line_stop);
  }
}
