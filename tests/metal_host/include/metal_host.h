// The names of Metal that C++ lacks, so that the text of a compute kernel compiles with clang (17
// or newer) and runs on a CPU. Freestanding: compiler builtins only, so that a kernel cannot lean
// on the C++ or C library by accident. The functions msl_rt_* are the runtime's (../runtime).
//
//   -DMSL_AS         address spaces become part of the type: mixing them does not compile
//   -DMSL_STRICT_BF  bfloat becomes a class that nothing converts to (for a syntax check only)
#pragma once
#if !defined(__clang__) || __clang_major__ < 17
#error "the Metal harness needs clang 17 or newer"
#endif
#pragma clang system_header

#define __METAL__ 1
#define __METAL_VERSION__ 310
#ifdef MSL_AS
#define MSL_ASQ(n) __attribute__((address_space(n)))
#else
#define MSL_ASQ(n)
#endif
#define device MSL_ASQ(1)
#define constant const MSL_ASQ(2)
#define threadgroup MSL_ASQ(3)
#define thread
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_INTERNAL METAL_FUNC
// what the runtime does itself is neither inlined nor checked
#define MSL_RAW __attribute__((noinline, no_sanitize("thread")))

#include "metal_types.h"
#include "metal_traits.h"
#include "metal_math.h"
#include "metal_simd.h"
#include "metal_matrix.h"
#include "metal_atomic.h"

template <class T, class U>
METAL_FUNC constexpr T as_type(U u) {
  static_assert(sizeof(T) == sizeof(U), "as_type: sizes differ");
  return __builtin_bit_cast(T, u);
}
// clang-format off
#pragma clang poison double typeid dynamic_cast throw try catch goto virtual thread_local std printf memcpy
