// Runs one dispatch of a compute kernel on the CPU: threadgroups one after the other, their threads
// as fibers. Built twice: with -DMSL_CHECK every load and store is checked.
#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/time.h>
#include <ucontext.h>

#include "state.h"
#include "switch.h"
#include "schedule.h"
#include "memory.h"
#include "counters.h"
#ifdef MSL_CHECK
#include "checks.h"
#else
static void judge_overwrites() {}
extern "C" void msl_rt_atomic(const volatile void*, unsigned, void*) {}
#endif

// Compiler support that older libgcc lacks: float to bfloat16, to nearest even.
extern "C" __attribute__((visibility("hidden"))) __bf16 __truncsfbf2(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  uint16_t half = uint16_t(nan ? (u >> 16) | 64 : (u + 0x7fffu + (u >> 16 & 1)) >> 16);
  __bf16 r;
  memcpy(&r, &half, 2);
  return r;
}

// ---- faults
static sigjmp_buf after_fault;

static void on_fault(int signal, siginfo_t* info, void* context) {
  const char* pc = nullptr;
#if defined(__x86_64__)
  pc = (const char*)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
#elif defined(__aarch64__)
  pc = (const char*)((ucontext_t*)context)->uc_mcontext.pc;
#endif
  const uintptr_t address = (uintptr_t)info->si_addr;
  const Region* r = region_of(address);
  if (signal == SIGVTALRM)
    failure = "timeout: the kernel did not end; last running ";
  else if (signal == SIGFPE)
    failure = "integer division by zero " + at(pc + 1) + ", ";
  else
    failure = "memory fault " + at(pc + 1) + ": " +
              (on_stack(address) ? "stack overflow of a thread"
               : r               ? place(*r, address)
                                 : format("address %#lx, far from any buffer", address)) +
              ", ";
  failure += who(fibers[current].thread);
  failed = true;
  siglongjmp(after_fault, 1);
}
struct FaultGuard {  // signal handlers and the timeout, for as long as it lives
  static constexpr int kSignals[4] = {SIGSEGV, SIGBUS, SIGFPE, SIGVTALRM};
  struct sigaction before[4];
  stack_t alternate = {}, stack_before;
  itimerval timer_before;
  FaultGuard() {
    alternate.ss_size = 64 << 10, alternate.ss_sp = malloc(alternate.ss_size);
    sigaltstack(&alternate, &stack_before);
    struct sigaction action = {};
    action.sa_sigaction = on_fault, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &before[i]);
    itimerval timer = {};
    timer.it_value.tv_sec = long(opt.timeout), timer.it_value.tv_usec = 1000;
    setitimer(ITIMER_VIRTUAL, &timer, &timer_before);
  }
  ~FaultGuard() {
    setitimer(ITIMER_VIRTUAL, &timer_before, nullptr);
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
    free(alternate.ss_sp);
  }
};

// ---- one threadgroup
static void run_group(uint32_t index, const uint32_t full[3], const uint32_t groups[3]) {
  group = index;
  const uint32_t pos[3] = {index % groups[0], index / groups[0] % groups[1],
                           index / (groups[0] * groups[1])};
  uint32_t size[3];  // smaller than `full` at the edges of the grid
  for (int k = 0; k < 3; ++k) size[k] = std::min(full[k], opt.grid[k] - pos[k] * full[k]);
  num_threads = num_live = size[0] * size[1] * size[2];
  num_at_barrier = 0, epoch_group = epoch_dev = 1;
  simdgroups.assign((num_threads + 31) / 32, Simdgroup());
  fibers.assign(num_threads, Fiber());
  loads.resize(std::max<size_t>(loads.size(), num_threads));
  drop_group_variables();
  for (uint32_t i = 0; i < num_threads; ++i) {
    Thread& t = fibers[i].thread;
    t.index = i, t.lane = i % 32, t.simdgroup = i / 32, t.simdgroups = uint32_t(simdgroups.size());
    t.full_simdgroups = (full[0] * full[1] * full[2] + 31) / 32;
    simdgroups[t.simdgroup].lanes |= 1u << t.lane;
    const uint32_t in[3] = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
    for (int k = 0; k < 3; ++k) {
      t.in_group[k] = in[k], t.group_pos[k] = pos[k], t.in_grid[k] = pos[k] * full[k] + in[k];
      t.group_size[k] = size[k], t.full_group[k] = full[k];
      t.grid[k] = opt.grid[k], t.groups[k] = groups[k];
    }
    start_fiber(i);
  }
  make_order(thread_order, num_threads);
  position = 0, current = thread_order[0], running = true;
  msl_switch(&main_sp, fibers[current].sp);
  running = false;
  judge_overwrites();
  ++totals.groups, totals.threads += num_threads;
  for (size_t i = num_buffers; i < regions.size() && !failed; ++i)
    if (!canary_intact(regions[i].map_lo, regions[i].map_hi, regions[i])) {
      failed = true;
      failure = "out-of-bounds write next to threadgroup variable '" + regions[i].name +
                format("', threadgroup %u", group);
    }
}

static void finish_buffer(Region& r, const Buffer& b) {
  const size_t n = b.bytes;
  if (!failed && !canary_intact(r.lo / kPage * kPage, (r.hi + kPage - 1) / kPage * kPage, r)) {
    failed = true;
    failure = "out-of-bounds write next to buffer '" + r.name + "'";
  }
  if (!failed && !r.writable && memcmp((void*)r.lo, b.host, n)) {
    failed = true;
    failure = "the kernel wrote to the input buffer '" + r.name + "'";
  }
  for (size_t i = 0; r.cells && r.writable && i < n; ++i) {
    const bool written = r.cells[i].flags & 1;  // INITIALISED
    totals.unwritten += !written;
    if (b.written) b.written[i] = written;
  }
  if (r.read) traffic[r.id].distinct = uint64_t(std::count(r.read, r.read + n, 1));
  if (r.writable) memcpy(b.host, (void*)r.lo, n);
  unmap(r.cells, n), unmap(r.read, n);
}

extern "C" __attribute__((visibility("default"))) int msl_run(Buffer* buffers, int n,
                                                              const Options* options, char* text,
                                                              uint64_t capacity, Totals* result,
                                                              Traffic* result_traffic) {
  opt = *options, totals = Totals(), failed = false, num_buffers = size_t(n);
  failure.clear(), reports.clear(), regions.clear();
  traffic.assign(n, Traffic());
  for (auto& lane : loads) lane.clear();
  random_state = opt.seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  Dl_info self;
  module_base = dladdr((void*)msl_run, &self) ? self.dli_fbase : nullptr;

  uint32_t full[3],
      groups[3];  // dispatchThreads, as MLX calls it: the group is clipped to the grid
  for (int k = 0; k < 3; ++k) {
    full[k] = std::min(opt.group[k], opt.grid[k]);
    groups[k] = full[k] ? (opt.grid[k] + full[k] - 1) / full[k] : 0;
  }
  const uint64_t most_threads = uint64_t(full[0]) * full[1] * full[2];
  if (!most_threads || most_threads > 1024 || n > 31) {
    snprintf(text, capacity,
             "FAIL %lu threads per threadgroup (1 to 1024), %d buffers (at most 31)\n",
             (unsigned long)most_threads, n);
    return 1;
  }
  reserve_arena(buffers, n);
  if (!arena || !reserve_stacks(most_threads)) {
    release_stacks();
    if (arena) munmap(arena, size_t(arena_end - arena));
    snprintf(text, capacity, "FAIL not enough address space\n");
    return 1;
  }
  char* next = arena + kGroupArea;
  buffer_pointers.assign(n, nullptr);
  for (int i = 0; i < n; ++i) {
    Region r = map_buffer(buffers[i], i, next);
    buffer_pointers[i] = (void*)r.lo;
#ifdef MSL_CHECK
    const Buffer& b = buffers[i];
    if (b.writable || b.written) r.cells = zeroed<Cell>(b.bytes);
    for (uint64_t k = 0; r.cells && k < b.bytes; ++k)
      if (b.writable ? b.initialised : b.written[k]) r.cells[k].flags = INITIALISED;
    if (opt.count) r.read = zeroed<uint8_t>(buffers[i].bytes);
#endif
    regions.push_back(r);
  }
  {
    FaultGuard guard;
    std::vector<uint32_t> order;
    make_order(order, groups[0] * groups[1] * groups[2]);
    if (!sigsetjmp(after_fault, 1))
      for (size_t i = 0; i < order.size() && !failed; ++i) run_group(order[i], full, groups);
    running = false;
  }
  drop_group_variables();
  for (int i = 0; i < n; ++i) finish_buffer(regions[i], buffers[i]);
  munmap(arena, size_t(arena_end - arena));
  release_stacks();

  std::string all = failed ? "FAIL " + failure + "\n" : "";
  for (auto& r : reports)
    all += std::string("REPORT ") + r.kind + " " + at(r.pc) + format(" x%lu: ", r.count) + r.text +
           "\n";
  totals.reports = uint32_t(reports.size());
  snprintf(text, capacity, "%s", all.c_str());
  *result = totals;
  std::copy(traffic.begin(), traffic.end(), result_traffic);
  return failed;
}
