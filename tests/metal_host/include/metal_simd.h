// Barriers and simdgroup functions: every lane brings its value to the runtime, the last one to
// come computes for all.
#pragma once
extern "C" {
enum { MSL_MEM_TG = 1, MSL_MEM_DEV = 2 };
void* msl_rt_tg(int id, const char* name, unsigned long size, int zeroed);
void msl_rt_barrier(int is_simd, int mem) __attribute__((convergent, noduplicate));
// every active lane brings `in`; the last one calls fn(in[32], out[32], mask)
typedef void (*msl_fn)(const void* const* in, void* const* out, unsigned mask, const void* ctx);
void msl_rt_simd(const char* op, const void* in, void* out, msl_fn fn, const void* ctx)
    __attribute__((convergent, noduplicate));
void msl_rt_atomic(const volatile void* p, unsigned size, void* pc);
unsigned msl_rt_lane();
[[noreturn]] void msl_rt_fail(const char* msg);
}

namespace metal {
enum class mem_flags {
  mem_none = 0,
  mem_device = MSL_MEM_DEV,
  mem_threadgroup = MSL_MEM_TG,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
#define threadgroup_barrier(...) msl_rt_barrier(0, int(__VA_ARGS__))
#define simdgroup_barrier(...) msl_rt_barrier(1, int(__VA_ARGS__))

// --------------------------------------------------------------- simd / quad
// What a lane gets from a lane that is not there (or out of range) is
// undefined on Metal; here it is a poison value, so that a use shows.
template <class T>
METAL_FUNC T poison() {
  T v;
  __builtin_memset(&v, 0xFF, sizeof v);
  return v;
}
template <class T, class F>
struct lanes_fn {
  static MSL_RAW void go(const void* const* in, void* const* out, unsigned mask, const void* ctx) {
    (*static_cast<const F*>(ctx))(reinterpret_cast<const T* const*>(in), out, mask);
  }
};
template <class R, class T, class F>
METAL_FUNC R collect(const char* op, T v, F f) {
  R r;
  msl_rt_simd(op, &v, &r, lanes_fn<T, F>::go, &f);
  return r;
}
#define MSL_EACH(m)                 \
  for (unsigned l = 0; l < 32; ++l) \
    if ((m) >> l & 1)
// tree reduction in the order of a butterfly, over the active lanes of each group of W
template <unsigned W, class T, class F>
METAL_FUNC T reduce(const char* op, T v, F f) {
  return collect<T>(op, v, [f](const T* const* in, void* const* out, unsigned mask) {
    for (unsigned g = 0; g < 32; g += W) {
      T a[W];
      bool on[W];
      for (unsigned i = 0; i < W; ++i) {
        on[i] = mask >> (g + i) & 1;
        if (on[i]) a[i] = *in[g + i];
      }
      for (unsigned s = W / 2; s; s /= 2)
        for (unsigned i = 0; i < s; ++i) {
          if (on[i] && on[i + s])
            a[i] = f(a[i], a[i + s]);
          else if (on[i + s]) {
            a[i] = a[i + s];
            on[i] = true;
          }
        }
      for (unsigned i = 0; i < W; ++i)
        if (mask >> (g + i) & 1) *static_cast<T*>(out[g + i]) = a[0];
    }
  });
}
template <class T>
METAL_FUNC T msl_add(T a, T b) {
  return T(a + b);
}
template <class T>
METAL_FUNC T msl_mul(T a, T b) {
  return T(a * b);
}
#define MSL_RED(name, E)                                                \
  template <class T>                                                    \
  METAL_FUNC T simd_##name(T v) {                                       \
    return reduce<32>("simd_" #name, v, [](T a, T b) { return T(E); }); \
  }                                                                     \
  template <class T>                                                    \
  METAL_FUNC T quad_##name(T v) {                                       \
    return reduce<4>("quad_" #name, v, [](T a, T b) { return T(E); });  \
  }
MSL_RED(sum, a + b)
MSL_RED(product, a* b) MSL_RED(min, min(a, b)) MSL_RED(max, max(a, b)) MSL_RED(and, a& b)
    MSL_RED(or, a | b) MSL_RED(xor, a ^ b) template <bool EX, class T, class F>
    METAL_FUNC T scan(const char* op, T v, T init, F f) {
  return collect<T>(op, v, [init, f](const T* const* in, void* const* out, unsigned mask) {
    T acc = init;
    MSL_EACH(mask) {
      T x = *in[l], y = f(acc, x);
      *static_cast<T*>(out[l]) = EX ? acc : y;
      acc = y;
    }
  });
}
template <class T>
METAL_FUNC T simd_prefix_exclusive_sum(T v) {
  return scan<true>("simd_prefix_exclusive_sum", v, T(0), msl_add<T>);
}
template <class T>
METAL_FUNC T simd_prefix_inclusive_sum(T v) {
  return scan<false>("simd_prefix_inclusive_sum", v, T(0), msl_add<T>);
}
template <class T>
METAL_FUNC T simd_prefix_exclusive_product(T v) {
  return scan<true>("simd_prefix_exclusive_product", v, T(1), msl_mul<T>);
}
template <class T>
METAL_FUNC T simd_prefix_inclusive_product(T v) {
  return scan<false>("simd_prefix_inclusive_product", v, T(1), msl_mul<T>);
}
// src(lane, its own argument) says from which lane of its group of W a lane reads
template <unsigned W, class T, class S>
METAL_FUNC T shuffle(const char* op, T v, ushort arg, S src) {
  struct P {
    T v;
    ushort a;
  } p{v, arg};
  return collect<T>(op, p, [src](const P* const* in, void* const* out, unsigned mask) {
    MSL_EACH(mask) {
      int s = src(int(l % W), int(in[l]->a));
      unsigned k = l / W * W + unsigned(s);
      *static_cast<T*>(out[l]) = (s >= 0 && s < int(W) && (mask >> k & 1)) ? in[k]->v : poison<T>();
    }
  });
}
#define MSL_SHUF(name, E)                                      \
  template <class T>                                           \
  METAL_FUNC T simd_##name(T v, ushort d) {                    \
    return shuffle<32>("simd_" #name, v, d, [](int l, int a) { \
      constexpr int W = 32;                                    \
      (void)W;                                                 \
      return E;                                                \
    });                                                        \
  }                                                            \
  template <class T>                                           \
  METAL_FUNC T quad_##name(T v, ushort d) {                    \
    return shuffle<4>("quad_" #name, v, d, [](int l, int a) {  \
      constexpr int W = 4;                                     \
      (void)W;                                                 \
      return E;                                                \
    });                                                        \
  }
MSL_SHUF(shuffle, a)
MSL_SHUF(broadcast, a) MSL_SHUF(shuffle_xor, l ^ a) MSL_SHUF(shuffle_rotate_up, (l - a + W) % W)
    MSL_SHUF(shuffle_rotate_down, (l + a) % W)
    // out of range: Metal leaves the lane's own value for up / down
    MSL_SHUF(shuffle_up, l - a < 0 ? l : l - a)
        MSL_SHUF(shuffle_down, l + a >= W ? l : l + a) template <class T>
        METAL_FUNC T simd_shuffle_and_fill_up(T v, T fill, ushort d) {
  T r = simd_shuffle_up(v, d);
  T f = simd_shuffle(fill, ushort((msl_rt_lane() + 32 - d) % 32));
  return msl_rt_lane() < d ? f : r;
}
template <class T>
METAL_FUNC T simd_shuffle_and_fill_down(T v, T fill, ushort d) {
  T r = simd_shuffle_down(v, d);
  T f = simd_shuffle(fill, ushort((msl_rt_lane() + d) % 32));
  return msl_rt_lane() + d >= 32 ? f : r;
}
template <class T>
METAL_FUNC T simd_broadcast_first(T v) {
  return collect<T>("simd_broadcast_first", v,
                    [](const T* const* in, void* const* out, unsigned mask) {
                      T x = *in[__builtin_ctz(mask)];
                      MSL_EACH(mask) * static_cast<T*>(out[l]) = x;
                    });
}
struct simd_vote {
  using vote_t = ulong;
  vote_t v;
  simd_vote(vote_t x = 0) : v(x) {}
  explicit operator vote_t() const { return v; }
  bool any() const { return v != 0; }
  bool all() const { return v == 0xFFFFFFFFul; }
};
METAL_FUNC simd_vote simd_ballot(bool p) {
  return simd_vote(
      collect<ulong>("simd_ballot", p, [](const bool* const* in, void* const* out, unsigned mask) {
        ulong b = 0;
        MSL_EACH(mask) b |= ulong(*in[l]) << l;
        MSL_EACH(mask) * static_cast<ulong*>(out[l]) = b;
      }));
}
METAL_FUNC simd_vote simd_active_threads_mask() { return simd_ballot(true); }
METAL_FUNC bool simd_any(bool p) { return simd_ballot(p).any(); }
METAL_FUNC bool simd_all(bool p) { return !simd_ballot(!p).any(); }
METAL_FUNC bool simd_is_first() {
  return __builtin_ctzl(simd_ballot(true).v) == int(msl_rt_lane());
}
}  // namespace metal
