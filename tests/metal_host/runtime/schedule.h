// Threads as fibers: one runs until it reaches a simd operation or a barrier, then the next one.
#pragma once
#include <stdlib.h>

#include <algorithm>

#include "state.h"

extern "C" void msl_entry(void* const* buffers, const Thread* thread);

static std::vector<void*> buffer_pointers;
static std::vector<uint32_t> thread_order;
static uint32_t position, num_live, num_at_barrier;  // position: of `current` in thread_order
static void* barrier_site;
static int barrier_memory;
static uint64_t random_state;

static void end_of_sync(uint32_t simdgroup);  // counters.h

static void make_order(std::vector<uint32_t>& order, uint32_t n) {
  order.resize(n);
  for (uint32_t i = 0; i < n; ++i) order[i] = opt.order == 1 ? n - 1 - i : i;
  if (opt.order != 2) return;
  for (uint32_t i = n; i > 1; --i) {
    random_state ^= random_state << 13, random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    std::swap(order[i - 1], order[random_state % i]);
  }
}

// ---- simd operations
static void complete_simd(uint32_t simdgroup, uint32_t lanes) {
  const void* in[32] = {};
  void* out[32] = {};
  for (int lane = 0; lane < 32; ++lane)
    if (lanes >> lane & 1) {
      Fiber& f = fibers[simdgroup * 32 + lane];
      in[lane] = f.in, out[lane] = f.out, f.state = READY;
    }
  Simdgroup& s = simdgroups[simdgroup];
  Fiber& first = fibers[simdgroup * 32 + __builtin_ctz(lanes)];
  s.arrived &= ~lanes;
  end_of_sync(simdgroup);
  if (first.combine) {
    ++totals.simd_ops;
    running = false;
    first.combine(in, out, lanes, first.ctx);
    running = true;
  } else {  // simdgroup_barrier
    ++totals.barriers;
    int memory = int((intptr_t)first.in);
    s.epoch_group += memory & 1, s.epoch_dev += memory >> 1 & 1;
  }
}
static uint32_t lanes_at_same_place(uint32_t simdgroup, uint32_t lanes) {
  const Fiber* first = &fibers[simdgroup * 32 + __builtin_ctz(lanes)];
  uint32_t same = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const Fiber& f = fibers[std::min<size_t>(simdgroup * 32 + lane, fibers.size() - 1)];
    if ((lanes >> lane & 1) && f.site == first->site && f.op == first->op) same |= 1u << lane;
  }
  return same;
}
static std::string waiting(uint32_t simdgroup) {
  std::string text;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(simdgroups[simdgroup].lanes >> lane & 1)) continue;
    const Fiber& f = fibers[simdgroup * 32 + lane];
    text += format("\n    lane %2d: ", lane);
    text += f.state == DONE    ? "returned from the kernel"
            : f.state == READY ? "runnable"
                               : f.op + (" " + at(f.site));
  }
  return text;
}

// ---- switching
static bool find_ready() {
  for (uint32_t i = 0; i < num_threads; ++i) {
    if (++position >= num_threads) position = 0;
    if (fibers[thread_order[position]].state != READY) continue;
    current = thread_order[position];
    return true;
  }
  return false;
}
static void release_barrier() {
  for (uint32_t s = 0; s < simdgroups.size(); ++s) end_of_sync(s);
  for (auto& f : fibers)
    if (f.state == AT_BARRIER) f.state = READY;
  epoch_group += barrier_memory & 1, epoch_dev += barrier_memory >> 1 & 1;
  ++totals.barriers;
  num_at_barrier = 0;
}
// Nothing can run: lanes wait for others that will not come.
static void resolve() {
  for (uint32_t s = 0; s < simdgroups.size(); ++s) {
    if (!simdgroups[s].arrived) continue;
    if (!opt.lenient)
      fail(format("divergence: simdgroup %u of threadgroup %u: not all lanes reached the same simd "
                  "operation",
                  s, group) +
           waiting(s));
    complete_simd(s, lanes_at_same_place(s, simdgroups[s].arrived));
    return;
  }
  if (!num_at_barrier || num_at_barrier != num_live) fail("internal: deadlock");
  if (!opt.lenient) {
    uint32_t s = 0;
    while (s + 1 < simdgroups.size() && !simdgroups[s].done) ++s;
    fail(
        format("divergence: threadgroup_barrier reached by %u of %u threads of threadgroup %u, the "
               "others returned",
               num_at_barrier, num_threads, group) +
        waiting(s));
  }
  release_barrier();
}
static void yield_thread() {
  Fiber* self = &fibers[current];
  if (!find_ready()) {
    if (!num_live) {
      msl_switch(&self->sp, main_sp);
      return;
    }
    resolve();
    if (!find_ready()) fail("internal: nothing to run");
  }
  Fiber* next = &fibers[current];
  if (next != self) msl_switch(&self->sp, next->sp);
}
static void fiber_main() {
  msl_entry(buffer_pointers.data(), &fibers[current].thread);
  Fiber& f = fibers[current];
  f.state = DONE, --num_live;
  Simdgroup& s = simdgroups[f.thread.simdgroup];
  s.done |= 1u << f.thread.lane;
  if (s.done == s.lanes) end_of_sync(f.thread.simdgroup);
  if (opt.lenient && s.arrived && s.arrived == (s.lanes & ~s.done) &&
      lanes_at_same_place(f.thread.simdgroup, s.arrived) == s.arrived)
    complete_simd(f.thread.simdgroup, s.arrived);
  yield_thread();
  abort();
}
static void start_fiber(uint32_t i) {
  void** sp = (void**)(stacks + (i + 1) * kStack) - kFrame;
  memset(sp, 0, kFrame * sizeof(void*));
  sp[kReturnSlot] = (void*)fiber_main;
  fibers[i].sp = sp, fibers[i].state = READY;
}

// ---- called by the kernel
static void wait_simd(const char* op, const void* in, void* out, Combine combine, const void* ctx,
                      void* site) {
  Fiber& f = fibers[current];
  const uint32_t index = f.thread.simdgroup;
  Simdgroup& s = simdgroups[index];
  f.op = op, f.site = site, f.in = in, f.out = out, f.combine = combine, f.ctx = ctx;
  f.state = AT_SIMD;
  s.arrived |= 1u << f.thread.lane;
  const uint32_t expected = opt.lenient ? s.lanes & ~s.done : s.lanes;
  if (s.arrived == expected) {
    if (lanes_at_same_place(index, expected) == expected) {
      complete_simd(index, expected);
      return;
    }
    if (!opt.lenient)
      fail(format("divergence: the lanes of simdgroup %u of threadgroup %u are at different simd "
                  "operations",
                  index, group) +
           waiting(index));
  }
  yield_thread();
}
extern "C" {
unsigned msl_rt_lane() { return fibers[current].thread.lane; }
[[noreturn]] void msl_rt_fail(const char* text) {
  fail(text + (", " + who(fibers[current].thread)));
}
__attribute__((noinline)) void msl_rt_simd(const char* op, const void* in, void* out,
                                           Combine combine, const void* ctx) {
  wait_simd(op, in, out, combine, ctx, __builtin_return_address(0));
}
__attribute__((noinline)) void msl_rt_barrier(int is_simd, int memory) {
  void* site = __builtin_return_address(0);
  if (is_simd) {
    wait_simd("simdgroup_barrier", (const void*)(intptr_t)memory, nullptr, nullptr, nullptr, site);
    return;
  }
  if (num_at_barrier && barrier_site != site && !opt.lenient)
    fail(format("divergence: threads of threadgroup %u wait at different threadgroup_barriers, ",
                group) +
         at(barrier_site) + " and " + at(site));
  Fiber& f = fibers[current];
  f.op = "threadgroup_barrier", f.site = site, f.state = AT_BARRIER;
  barrier_site = site, barrier_memory = memory;
  if (++num_at_barrier == num_threads)
    release_barrier();
  else
    yield_thread();
}
}
