// Scalars and vectors: half and bfloat round after every operation, vec<T, N> has swizzles, and the
// constructors T4(...) are macros, since clang's vector types have none.
#pragma once
typedef unsigned char uchar;
typedef signed char msl_schar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef long intptr_t;
typedef unsigned long uintptr_t;
typedef _Float16 half;
#ifndef MSL_STRICT_BF
typedef __bf16 bfloat;
#else
// lint only: Metal converts bfloat to float implicitly, and nothing to bfloat
struct bfloat {
  __bf16 v;
  bfloat() = default;
  template <class T, class = decltype(float(T()))>
  explicit constexpr bfloat(T x) : v(static_cast<__bf16>(float(x))) {}
  constexpr operator float() const { return float(v); }
  friend constexpr bfloat operator+(bfloat a, bfloat b) { return bfloat(float(a) + float(b)); }
  friend constexpr bfloat operator-(bfloat a, bfloat b) { return bfloat(float(a) - float(b)); }
  friend constexpr bfloat operator*(bfloat a, bfloat b) { return bfloat(float(a) * float(b)); }
  friend constexpr bfloat operator/(bfloat a, bfloat b) { return bfloat(float(a) / float(b)); }
  friend constexpr bfloat operator-(bfloat a) { return bfloat(-float(a)); }
  bfloat& operator+=(bfloat b) { return *this = *this + b; }
  bfloat& operator-=(bfloat b) { return *this = *this - b; }
  bfloat& operator*=(bfloat b) { return *this = *this * b; }
  bfloat& operator/=(bfloat b) { return *this = *this / b; }
};
#endif
constexpr half operator""h(long double x) { return half(x); }
constexpr half operator"" H(long double x) { return half(x); }
constexpr bfloat operator"" bf(long double x) { return bfloat(float(x)); }
#define NAN __builtin_nanf("")
#define INFINITY __builtin_inff()
#define MAXFLOAT __FLT_MAX__
#define M_PI_F 3.14159265358979323846f
#define M_2_PI_F 0.636619772367581343076f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define M_LN2_F 0.69314718055994530942f
#define M_LOG2E_F 1.4426950408889634074f
#define M_E_F 2.71828182845904523536f

namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
}
#define MSL_VEC(T, U)            \
  typedef metal::vec<T, 2> U##2; \
  typedef metal::vec<T, 3> U##3; \
  typedef metal::vec<T, 4> U##4;
MSL_VEC(float, float)
MSL_VEC(half, half)
#ifndef MSL_STRICT_BF
    MSL_VEC(bfloat, bfloat)
#endif
        MSL_VEC(char, char) MSL_VEC(uchar, uchar) MSL_VEC(short, short) MSL_VEC(ushort, ushort)
            MSL_VEC(int, int) MSL_VEC(uint, uint) MSL_VEC(long, long) MSL_VEC(ulong, ulong)
                MSL_VEC(int, bool)

    // ------------------------------------------------- vector constructors T4(...)
    namespace msl {
  template <class T, T V>
  struct integral_constant {
    static constexpr T value = V;
    using value_type = T;
    using type = integral_constant;
    constexpr operator T() const { return V; }
    constexpr T operator()() const { return V; }
  };
  template <class T>
  struct vtraits {
    using elem = T;
    static constexpr int n = 1;
  };
  template <class T, int N>
  struct vtraits<metal::vec<T, N>> {
    using elem = T;
    static constexpr int n = N;
  };
  template <class T, int N>
  METAL_FUNC void put(metal::vec<T, N> & r, int& i) {}
  template <class T, int N, class A, class... R>
  METAL_FUNC constexpr void put(metal::vec<T, N> & r, int& i, A a, R... rest);
  template <class T, int N, class A, bool V>
  struct put1 {
    static METAL_FUNC void go(metal::vec<T, N>& r, int& i, A a) { r[i++] = T(a); }
  };
  template <class T, int N, class A>
  struct put1<T, N, A, true> {
    static METAL_FUNC void go(metal::vec<T, N>& r, int& i, A a) {
      for (int k = 0; k < vtraits<A>::n; ++k) r[i++] = T(a[k]);
    }
  };
  template <class... A>
  struct count {
    static constexpr int n = 0;
  };
  template <class A, class... R>
  struct count<A, R...> {
    static constexpr int n = vtraits<A>::n + count<R...>::n;
  };
  template <class T, int N>
  METAL_FUNC metal::vec<T, N> mk() {
    return metal::vec<T, N>(T(0));
  }
  template <class T, int N, class... A>
  METAL_FUNC metal::vec<T, N> mk(A... a) {
    static_assert(count<A...>::n == N || (sizeof...(A) == 1 && count<A...>::n == 1),
                  "wrong number of components in a vector constructor");
    metal::vec<T, N> r;
    int i = 0;
    int order[] = {(put1<T, N, A, (vtraits<A>::n > 1)>::go(r, i, a), 0)...};
    (void)order;
    for (; i < N; ++i) r[i] = r[0];
    return r;
  }
}  // namespace msl
#define float2(...) ::msl::mk<float, 2>(__VA_ARGS__)
#define float3(...) ::msl::mk<float, 3>(__VA_ARGS__)
#define float4(...) ::msl::mk<float, 4>(__VA_ARGS__)
#define half2(...) ::msl::mk<half, 2>(__VA_ARGS__)
#define half3(...) ::msl::mk<half, 3>(__VA_ARGS__)
#define half4(...) ::msl::mk<half, 4>(__VA_ARGS__)
#define bfloat2(...) ::msl::mk<bfloat, 2>(__VA_ARGS__)
#define bfloat4(...) ::msl::mk<bfloat, 4>(__VA_ARGS__)
#define char4(...) ::msl::mk<char, 4>(__VA_ARGS__)
#define uchar4(...) ::msl::mk<uchar, 4>(__VA_ARGS__)
#define short2(...) ::msl::mk<short, 2>(__VA_ARGS__)
#define short4(...) ::msl::mk<short, 4>(__VA_ARGS__)
#define ushort2(...) ::msl::mk<ushort, 2>(__VA_ARGS__)
#define ushort4(...) ::msl::mk<ushort, 4>(__VA_ARGS__)
#define int2(...) ::msl::mk<int, 2>(__VA_ARGS__)
#define int3(...) ::msl::mk<int, 3>(__VA_ARGS__)
#define int4(...) ::msl::mk<int, 4>(__VA_ARGS__)
#define uint2(...) ::msl::mk<uint, 2>(__VA_ARGS__)
#define uint3(...) ::msl::mk<uint, 3>(__VA_ARGS__)
#define uint4(...) ::msl::mk<uint, 4>(__VA_ARGS__)
#define long2(...) ::msl::mk<long, 2>(__VA_ARGS__)
#define ulong2(...) ::msl::mk<ulong, 2>(__VA_ARGS__)
#define ulong3(...) ::msl::mk<ulong, 3>(__VA_ARGS__)
