// simdgroup_matrix.
#pragma once
namespace metal {
// 8x8 over 32 lanes, two neighbours of a row in each, laid out as on Apple
// GPUs (the layout MLX's steel kernels rely on).
template <class T, int C = 8, int R = C>
struct simdgroup_matrix {
  static_assert(C == 8 && R == 8, "only 8x8");
  vec<T, 2> e;
  simdgroup_matrix() : e(poison<vec<T, 2>>()) {}
  explicit simdgroup_matrix(T diag) {
    e[0] = row() == col() ? diag : T(0);
    e[1] = row() == col() + 1 ? diag : T(0);
  }
  vec<T, 2>& thread_elements() { return e; }
  const vec<T, 2>& thread_elements() const { return e; }
  static int row_of(unsigned l) { return int((l / 4 & 4) + l / 2 % 4); }
  static int col_of(unsigned l) { return int((l / 4 & 2) * 2 + l % 2 * 2); }
  static int row() { return row_of(msl_rt_lane()); }
  static int col() { return col_of(msl_rt_lane()); }
};
template <class T, int C, int R = C>
METAL_FUNC simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, C, R> m;
  m.e = vec<T, 2>(v);
  return m;
}
template <class T, class P>
METAL_FUNC void simdgroup_load(simdgroup_matrix<T, 8, 8>& d, P src, ulong ld = 8,
                               vec<ulong, 2> o = {0, 0}, bool tr = false) {
  simd_ballot(true);
  for (int k = 0; k < 2; ++k) {
    ulong r = d.row(), c = d.col() + k;
    d.e[k] = T(tr ? src[(o.y + c) * ld + o.x + r] : src[(o.y + r) * ld + o.x + c]);
  }
}
template <class T, class P>
METAL_FUNC void simdgroup_store(simdgroup_matrix<T, 8, 8> d, P dst, ulong ld = 8,
                                vec<ulong, 2> o = {0, 0}, bool tr = false) {
  simd_ballot(true);
  for (int k = 0; k < 2; ++k) {
    ulong r = d.row(), c = d.col() + k;
    if (tr)
      dst[(o.y + c) * ld + o.x + r] = d.e[k];
    else
      dst[(o.y + r) * ld + o.x + c] = d.e[k];
  }
}
template <class D, class A, class B, class C>
METAL_FUNC void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d,
                                              simdgroup_matrix<A, 8, 8> a,
                                              simdgroup_matrix<B, 8, 8> b,
                                              simdgroup_matrix<C, 8, 8> c) {
  struct P {
    vec<A, 2> a;
    vec<B, 2> b;
    vec<C, 2> c;
  } p{a.e, b.e, c.e};
  d.e = collect<vec<D, 2>>("simdgroup_multiply_accumulate", p,
                           [](const P* const* in, void* const* out, unsigned mask) {
                             if (mask != 0xFFFFFFFFu)
                               msl_rt_fail("simdgroup_multiply_accumulate without all 32 lanes");
                             float ma[8][8], mb[8][8];
                             using M = simdgroup_matrix<D, 8, 8>;
                             for (unsigned l = 0; l < 32; ++l)
                               for (int k = 0; k < 2; ++k) {
                                 ma[M::row_of(l)][M::col_of(l) + k] = float(in[l]->a[k]);
                                 mb[M::row_of(l)][M::col_of(l) + k] = float(in[l]->b[k]);
                               }
                             for (unsigned l = 0; l < 32; ++l)
                               for (int k = 0; k < 2; ++k) {
                                 int r = M::row_of(l), q = M::col_of(l) + k;
                                 float s = float(in[l]->c[k]);
                                 for (int i = 0; i < 8; ++i) s += ma[r][i] * mb[i][q];
                                 (*static_cast<vec<D, 2>*>(out[l]))[k] = D(s);
                               }
                           });
}
template <class D, class A, class B>
METAL_FUNC void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                   simdgroup_matrix<B, 8, 8> b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8>(D(0)));
}
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
#ifndef MSL_STRICT_BF
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
#endif
}  // namespace metal
