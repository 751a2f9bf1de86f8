// Atomics.
#pragma once
namespace metal {
// Fibers never preempt, so plain accesses are atomic; the runtime only notes
// that these bytes were touched atomically.
enum memory_order {
  memory_order_relaxed,
  memory_order_acquire,
  memory_order_release,
  memory_order_acq_rel,
  memory_order_seq_cst
};
enum thread_scope {
  thread_scope_thread,
  thread_scope_simdgroup,
  thread_scope_threadgroup,
  thread_scope_device
};
METAL_FUNC void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {}
template <class T>
struct atomic {
  T s;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<ulong> atomic_ulong;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;
#define MSL_AT(P) decltype(P()->s + 0)
template <class P>
MSL_RAW auto atomic_load_explicit(P p, memory_order) {
  msl_rt_atomic((const volatile void*)(uintptr_t)p, sizeof p->s, __builtin_return_address(0));
  remove_cv_t<remove_reference_t<decltype(+p->s)>> v = p->s;
  return v;
}
template <class P, class V>
MSL_RAW void atomic_store_explicit(P p, V v, memory_order) {
  msl_rt_atomic((const volatile void*)(uintptr_t)p, sizeof p->s, __builtin_return_address(0));
  p->s = v;
}
#define MSL_RMW(name, E)                                                                         \
  template <class P, class V>                                                                    \
  MSL_RAW auto atomic_##name##_explicit(P p, V x, memory_order) {                                \
    msl_rt_atomic((const volatile void*)(uintptr_t)p, sizeof p->s, __builtin_return_address(0)); \
    auto old = +p->s;                                                                            \
    decltype(old) v = decltype(old)(x);                                                          \
    p->s = E;                                                                                    \
    return old;                                                                                  \
  }
MSL_RMW(exchange, v)
MSL_RMW(fetch_add, old + v) MSL_RMW(fetch_sub, old - v) MSL_RMW(fetch_and, old& v)
    MSL_RMW(fetch_or, old | v) MSL_RMW(fetch_xor, old ^ v) MSL_RMW(fetch_min, old < v ? old : v)
        MSL_RMW(fetch_max, old > v ? old : v) template <class P, class E, class V>
        MSL_RAW
    bool atomic_compare_exchange_weak_explicit(P p, E* e, V v, memory_order, memory_order) {
  msl_rt_atomic((const volatile void*)(uintptr_t)p, sizeof p->s, __builtin_return_address(0));
  if (p->s == *e) {
    p->s = v;
    return true;
  }
  *e = p->s;
  return false;
}
}  // namespace metal
