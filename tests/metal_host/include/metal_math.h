// <metal_math>, <metal_integer>, <metal_common>.
#pragma once
namespace metal {
// Metal's overload sets, not templates, for scalars: a call such as
// max(int, uint) or max(half, float) is ambiguous here as it is there.
// bfloat: the overloads that MLX's bf16_math.h adds to every custom kernel.
#define MSL_V1(f)                                  \
  template <class T, int N>                        \
  METAL_FUNC vec<T, N> f(vec<T, N> x) {            \
    vec<T, N> r;                                   \
    for (int i = 0; i < N; ++i) r[i] = f(T(x[i])); \
    return r;                                      \
  }
#define MSL_V2(f)                                           \
  template <class T, int N>                                 \
  METAL_FUNC vec<T, N> f(vec<T, N> x, vec<T, N> y) {        \
    vec<T, N> r;                                            \
    for (int i = 0; i < N; ++i) r[i] = f(T(x[i]), T(y[i])); \
    return r;                                               \
  }
#define MSL_V3(f)                                                    \
  template <class T, int N>                                          \
  METAL_FUNC vec<T, N> f(vec<T, N> x, vec<T, N> y, vec<T, N> z) {    \
    vec<T, N> r;                                                     \
    for (int i = 0; i < N; ++i) r[i] = f(T(x[i]), T(y[i]), T(z[i])); \
    return r;                                                        \
  }
#define MSL_F1(f, E)                        \
  METAL_FUNC float f(float x) { return E; } \
  METAL_FUNC half f(half h) {               \
    float x = h;                            \
    return half(E);                         \
  }                                         \
  METAL_FUNC bfloat f(bfloat h) {           \
    float x = h;                            \
    return bfloat(E);                       \
  }                                         \
  MSL_V1(f)
#define MSL_F2(f, E)                                 \
  METAL_FUNC float f(float x, float y) { return E; } \
  METAL_FUNC half f(half a, half b) {                \
    float x = a, y = b;                              \
    return half(E);                                  \
  }                                                  \
  METAL_FUNC bfloat f(bfloat a, bfloat b) {          \
    float x = a, y = b;                              \
    return bfloat(E);                                \
  }                                                  \
  MSL_V2(f)
#define MSL_F3(f, E)                                          \
  METAL_FUNC float f(float x, float y, float z) { return E; } \
  METAL_FUNC half f(half a, half b, half c) {                 \
    float x = a, y = b, z = c;                                \
    return half(E);                                           \
  }                                                           \
  METAL_FUNC bfloat f(bfloat a, bfloat b, bfloat c) {         \
    float x = a, y = b, z = c;                                \
    return bfloat(E);                                         \
  }                                                           \
  MSL_V3(f)
MSL_F1(exp, __builtin_expf(x))
MSL_F1(exp2, __builtin_exp2f(x)) MSL_F1(exp10, __builtin_powf(10.0f, x)) MSL_F1(
    log, __builtin_logf(x)) MSL_F1(log2, __builtin_log2f(x)) MSL_F1(log10, __builtin_log10f(x))
    MSL_F1(sqrt, __builtin_sqrtf(x)) MSL_F1(rsqrt, 1.0f / __builtin_sqrtf(x)) MSL_F1(
        sin, __builtin_sinf(x)) MSL_F1(cos, __builtin_cosf(x)) MSL_F1(tan, __builtin_tanf(x))
        MSL_F1(asin, __builtin_asinf(x)) MSL_F1(acos, __builtin_acosf(x)) MSL_F1(
            atan, __builtin_atanf(x)) MSL_F1(sinh, __builtin_sinhf(x))
            MSL_F1(cosh, __builtin_coshf(x)) MSL_F1(tanh, __builtin_tanhf(x)) MSL_F1(
                asinh,
                __builtin_asinhf(x)) MSL_F1(acosh, __builtin_acoshf(x))
                MSL_F1(atanh, __builtin_atanhf(x)) MSL_F1(floor, __builtin_floorf(x)) MSL_F1(
                    ceil, __builtin_ceilf(x)) MSL_F1(trunc, __builtin_truncf(x))
                    MSL_F1(rint, __builtin_rintf(x)) MSL_F1(round, __builtin_roundf(x)) MSL_F1(
                        fabs, __builtin_fabsf(x)) MSL_F1(fract, x - __builtin_floorf(x))
                        MSL_F1(sign, float((x > 0) - (x < 0))) MSL_F1(
                            saturate,
                            x < 0 ? 0.0f
                            : x > 1
                                ? 1.0f
                                : x) MSL_F2(pow, __builtin_powf(x, y))
                            MSL_F2(powr, __builtin_powf(x, y)) MSL_F2(fmod, __builtin_fmodf(x, y))
                                MSL_F2(atan2, __builtin_atan2f(x, y)) MSL_F2(
                                    fmin, __builtin_fminf(x, y)) MSL_F2(fmax, __builtin_fmaxf(x, y))
                                    MSL_F2(copysign, __builtin_copysignf(x, y))
                                        MSL_F2(divide, x / y) MSL_F2(step, y < x ? 0.0f : 1.0f)
                                            MSL_F2(fdim, __builtin_fdimf(x, y))
                                                MSL_F3(fma, __builtin_fmaf(x, y, z))
                                                    MSL_F3(mix, x + (y - x) * z)
#define MSL_MM(T)                                      \
  METAL_FUNC T min(T a, T b) { return b < a ? b : a; } \
  METAL_FUNC T max(T a, T b) { return a < b ? b : a; } \
  METAL_FUNC T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }
#define MSL_FMM(T)                                                       \
  METAL_FUNC T min(T a, T b) { return fmin(a, b); }                      \
  METAL_FUNC T max(T a, T b) { return fmax(a, b); }                      \
  METAL_FUNC T clamp(T x, T lo, T hi) { return fmin(fmax(x, lo), hi); }  \
  METAL_FUNC T abs(T x) { return fabs(x); }                              \
  METAL_FUNC bool isnan(T x) { return __builtin_isnan(float(x)); }       \
  METAL_FUNC bool isinf(T x) { return __builtin_isinf(float(x)); }       \
  METAL_FUNC bool isfinite(T x) { return __builtin_isfinite(float(x)); } \
  METAL_FUNC bool signbit(T x) { return __builtin_signbit(float(x)); }
                                                        MSL_FMM(float) MSL_FMM(half) MSL_FMM(bfloat)
#define MSL_IMM(T, U)                                                                      \
  MSL_MM(T)                                                                                \
  METAL_FUNC T abs(T x) { return x < T(0) ? T(-x) : x; }                                   \
  METAL_FUNC T popcount(T x) { return T(__builtin_popcountl(ulong(U(x)))); }               \
  METAL_FUNC T clz(T x) {                                                                  \
    return T(x ? __builtin_clzl(ulong(U(x))) - (64 - int(sizeof(T)) * 8) : sizeof(T) * 8); \
  }                                                                                        \
  METAL_FUNC T ctz(T x) { return T(x ? __builtin_ctzl(ulong(U(x))) : sizeof(T) * 8); }     \
  METAL_FUNC T rotate(T x, T y) {                                                          \
    uint s = uint(y) % (sizeof(T) * 8);                                                    \
    return s ? T((U(x) << s) | (U(x) >> (sizeof(T) * 8 - s))) : x;                         \
  }                                                                                        \
  METAL_FUNC T extract_bits(T x, uint o, uint b) {                                         \
    return b ? T(T(U(x) << (sizeof(T) * 8 - o - b)) >> (sizeof(T) * 8 - b)) : T(0);        \
  }                                                                                        \
  METAL_FUNC T insert_bits(T x, T y, uint o, uint b) {                                     \
    U m = U((b >= sizeof(T) * 8 ? U(-1) : U((U(1) << b) - 1)) << o);                       \
    return T((U(x) & U(~m)) | (U(y << o) & m));                                            \
  }                                                                                        \
  METAL_FUNC T absdiff(T x, T y) { return x > y ? T(x - y) : T(y - x); }
                                                            MSL_IMM(msl_schar,
                                                                    uchar) MSL_IMM(char, uchar)
                                                                MSL_IMM(uchar, uchar) MSL_IMM(
                                                                    short, ushort) MSL_IMM(ushort,
                                                                                           ushort)
                                                                    MSL_IMM(int, uint) MSL_IMM(uint,
                                                                                               uint)
                                                                        MSL_IMM(long, ulong)
                                                                            MSL_IMM(ulong, ulong)
                                                                                METAL_FUNC uint
    mulhi(uint a, uint b) {
  return uint((ulong(a) * b) >> 32);
}
METAL_FUNC int mulhi(int a, int b) { return int((long(a) * b) >> 32); }
METAL_FUNC ulong mulhi(ulong a, ulong b) { return ulong(((unsigned __int128)a * b) >> 64); }
MSL_V2(min)
MSL_V2(max) MSL_V3(clamp) MSL_V1(abs) template <class T, int N>
METAL_FUNC vec<T, N> clamp(vec<T, N> x, T lo, T hi) {
  return clamp(x, vec<T, N>(lo), vec<T, N>(hi));
}
template <class T, int N>
METAL_FUNC vec<T, N> max(vec<T, N> x, T y) {
  return max(x, vec<T, N>(y));
}
template <class T, int N>
METAL_FUNC vec<T, N> min(vec<T, N> x, T y) {
  return min(x, vec<T, N>(y));
}
template <class T, int N>
METAL_FUNC T dot(vec<T, N> a, vec<T, N> b) {
  T r = a[0] * b[0];
  for (int i = 1; i < N; ++i) r += a[i] * b[i];
  return r;
}
template <class T, int N>
METAL_FUNC T length(vec<T, N> a) {
  return sqrt(dot(a, a));
}
template <class T>
METAL_FUNC T select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, class M, int N>
METAL_FUNC vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<M, N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; ++i) r[i] = c[i] ? b[i] : a[i];
  return r;
}
template <class M, int N>
METAL_FUNC bool any(vec<M, N> m) {
  bool r = false;
  for (int i = 0; i < N; ++i) r |= m[i] != 0;
  return r;
}
template <class M, int N>
METAL_FUNC bool all(vec<M, N> m) {
  bool r = true;
  for (int i = 0; i < N; ++i) r &= m[i] != 0;
  return r;
}
METAL_FUNC float sincos(float x, float& c) {
  c = __builtin_cosf(x);
  return __builtin_sinf(x);
}
namespace fast {
using namespace metal;
}
namespace precise {
using namespace metal;
}
template <class T>
METAL_FUNC void swap(T& a, T& b) {
  T t = a;
  a = b;
  b = t;
}
}  // namespace metal
