// <metal_type_traits> and numeric_limits.
#pragma once
namespace metal {
using msl::integral_constant;
template <bool B>
using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;
template <class T>
struct remove_cv {
  using type = T;
};
template <class T>
struct remove_cv<const T> {
  using type = T;
};
template <class T>
struct remove_cv<volatile T> {
  using type = T;
};
template <class T>
struct remove_cv<const volatile T> {
  using type = T;
};
template <class T>
using remove_cv_t = typename remove_cv<T>::type;
template <class T>
struct remove_reference {
  using type = T;
};
template <class T>
struct remove_reference<T&> {
  using type = T;
};
template <class T>
struct remove_reference<T&&> {
  using type = T;
};
template <class T>
using remove_reference_t = typename remove_reference<T>::type;
template <class T>
struct remove_addrspace {
  using type = T;
};
#ifdef MSL_AS
template <class T>
struct remove_addrspace<device T> {
  using type = T;
};
template <class T>
struct remove_addrspace<threadgroup T> {
  using type = T;
};
template <class T>
struct remove_addrspace<MSL_ASQ(2) T> {
  using type = T;
};
#endif
template <class T>
using remove_addrspace_t = typename remove_addrspace<T>::type;
template <class T>
struct remove_pointer {
  using type = T;
};
template <class T>
struct remove_pointer<T*> {
  using type = T;
};
template <class T>
using remove_pointer_t = typename remove_pointer<T>::type;
template <class T>
using decay_t = __decay(T);
template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F>
struct conditional {
  using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;
template <class A, class B>
struct is_same : bool_constant<__is_same(A, B)> {};
template <class A, class B>
constexpr bool is_same_v = __is_same(A, B);
template <class A, class B>
struct is_convertible : bool_constant<__is_convertible(A, B)> {};
template <class A, class B>
constexpr bool is_convertible_v = __is_convertible(A, B);
template <class T>
constexpr bool is_floating_point_v = __is_floating_point(remove_cv_t<T>);
template <class T>
struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T>
constexpr bool is_integral_v = __is_integral(remove_cv_t<T>);
template <class T>
struct is_integral : bool_constant<is_integral_v<T>> {};
template <class T>
constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T>
struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class T>
constexpr bool is_signed_v = __is_signed(remove_cv_t<T>);
template <class T>
constexpr bool is_unsigned_v = is_integral_v<T> && !is_signed_v<T>;
template <class T>
struct is_unsigned : bool_constant<is_unsigned_v<T>> {};
template <class T>
struct is_signed : bool_constant<is_signed_v<T>> {};
template <class T>
struct make_unsigned {
  using type = __make_unsigned(T);
};
template <class T>
using make_unsigned_t = __make_unsigned(T);
template <class T>
remove_reference_t<T>&& declval();

template <class T>
struct numeric_limits;
#define MSL_FLIM(T, MX, MN, EP, DG)                                  \
  template <>                                                        \
  struct numeric_limits<T> {                                         \
    static constexpr bool is_integer = false, is_signed = true;      \
    static constexpr int digits = DG;                                \
    static constexpr T max() { return T(MX); }                       \
    static constexpr T lowest() { return T(-(MX)); }                 \
    static constexpr T min() { return T(MN); }                       \
    static constexpr T epsilon() { return T(EP); }                   \
    static constexpr T infinity() { return T(__builtin_inff()); }    \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); } \
  };
MSL_FLIM(float, __FLT_MAX__, __FLT_MIN__, __FLT_EPSILON__, 24)
MSL_FLIM(half, 65504.0f, 6.103515625e-05f, 9.765625e-04f, 11)
MSL_FLIM(bfloat, 3.3895313892515355e38f, __FLT_MIN__, 7.8125e-03f, 8)
#define MSL_ILIM(T)                                                        \
  template <>                                                              \
  struct numeric_limits<T> {                                               \
    static constexpr bool is_integer = true, is_signed = T(-1) < T(0);     \
    static constexpr T max() {                                             \
      return is_signed ? T((ulong(1) << (sizeof(T) * 8 - 1)) - 1) : T(-1); \
    }                                                                      \
    static constexpr T min() { return is_signed ? T(-max() - 1) : T(0); }  \
    static constexpr T lowest() { return min(); }                          \
    static constexpr int digits = sizeof(T) * 8 - is_signed;               \
  };
MSL_ILIM(msl_schar)
MSL_ILIM(char) MSL_ILIM(uchar) MSL_ILIM(short) MSL_ILIM(ushort) MSL_ILIM(int) MSL_ILIM(uint)
    MSL_ILIM(long) MSL_ILIM(ulong) template <>
    struct numeric_limits<bool> {
  static constexpr bool max() { return true; }
  static constexpr bool min() { return false; }
};

template <class T, int N>
struct array {
  T e[N];
  T& operator[](int i) { return e[i]; }
  const T& operator[](int i) const { return e[i]; }
};
template <class T>
using uniform = T;
template <class T>
constexpr T make_uniform(T x) {
  return x;
}
}  // namespace metal
