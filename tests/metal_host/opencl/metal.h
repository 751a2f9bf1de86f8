// The names of Metal in clang's C++ for OpenCL, for a syntax check only: there, as in Metal 4.1,
// `this` of an unqualified member function points to the generic address space, and nothing leads
// back from that to `thread`. What the functions do does not matter here, only their types.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define threadgroup __local
#define constant __constant
#define thread __private
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef short int16_t;
typedef uint uint32_t;
typedef int int32_t;
typedef ulong uint64_t;
typedef long int64_t;
typedef half float16_t;
// clang has no bfloat for this target; a type of its own that float converts to and from will do
typedef double bfloat;
typedef bfloat bfloat16_t;

template <typename To, typename From>
inline To as_type(From from) {
  return __builtin_astype(from, To);
}
template <typename To>
inline To as_type(bfloat) {
  static_assert(sizeof(To) == 2, "as_type keeps the size");
  return To(0);
}

namespace metal {
inline uint popcount_of(uint bits) {
  return __builtin_popcount(bits);
}
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
inline void threadgroup_barrier(mem_flags) {}
inline void simdgroup_barrier(mem_flags) {}
struct simd_vote {
  typedef ulong vote_t;
  vote_t bits;
  explicit operator vote_t() const { return bits; }
};
inline simd_vote simd_ballot(bool vote) {
  return {vote};
}
inline bool simd_any(bool vote) {
  return vote;
}
inline bool simd_all(bool vote) {
  return vote;
}
#define OF_ONE(name)           \
  template <typename T>        \
  inline T name(T value) {     \
    return value;              \
  }
OF_ONE(simd_sum)
OF_ONE(simd_max)
OF_ONE(simd_min)
OF_ONE(simd_or)
OF_ONE(simd_and)
OF_ONE(simd_broadcast_first)
OF_ONE(simd_prefix_exclusive_sum)
OF_ONE(simd_prefix_inclusive_sum)
#define OF_LANE(name)                 \
  template <typename T>               \
  inline T name(T value, ushort) {    \
    return value;                     \
  }
OF_LANE(simd_shuffle)
OF_LANE(simd_shuffle_xor)
OF_LANE(simd_shuffle_up)
OF_LANE(simd_shuffle_down)
OF_LANE(simd_broadcast)
namespace precise {
inline float exp(float x) {
  return ::exp(x);
}
inline float rsqrt(float x) {
  return ::rsqrt(x);
}
}  // namespace precise
namespace fast {
inline float exp(float x) {
  return ::exp(x);
}
inline float rsqrt(float x) {
  return ::rsqrt(x);
}
}  // namespace fast
template <typename T, int ROWS, int COLUMNS>
struct simdgroup_matrix {
  T elements[2];
  thread T* thread_elements() thread { return elements; }
};
template <typename D, typename A, typename B, typename C>
inline void simdgroup_multiply_accumulate(thread D& d, A a, B b, C c) {
  d.thread_elements()[0] = a.elements[0] * b.elements[0] + c.elements[0];
}
template <bool, typename T, typename F>
struct conditional {
  typedef T type;
};
template <typename T, typename F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool B, typename T, typename F>
using conditional_t = typename conditional<B, T, F>::type;
}  // namespace metal
#define popcount metal::popcount_of
using namespace metal;
