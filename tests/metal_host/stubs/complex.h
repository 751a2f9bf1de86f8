// stands in for mlx/backend/metal/kernels/complex.h, whose members are
// overloaded by address space (no C++ spelling)
template <typename T>
struct complex_t {
  using value_type = T;
  T real, imag;
  constexpr complex_t() : real(0), imag(0) {}
  constexpr complex_t(T r, T i) : real(r), imag(i) {}
  template <typename U, typename = metal::enable_if_t<metal::is_convertible_v<U, T>>>
  constexpr complex_t(U x) : real(T(x)), imag(T(0)) {}
};
template <typename T>
static constexpr constant bool is_complex_v = false;
template <typename T>
static constexpr constant bool is_complex_v<complex_t<T>> = true;
typedef complex_t<float> complex64_t;
constexpr complex64_t operator+(complex64_t a, complex64_t b) {
  return {a.real + b.real, a.imag + b.imag};
}
constexpr complex64_t operator*(complex64_t a, complex64_t b) {
  return {a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real};
}
constexpr complex64_t operator/(complex64_t a, complex64_t b) {
  float d = b.real * b.real + b.imag * b.imag;
  return {(a.real * b.real + a.imag * b.imag) / d, (a.imag * b.real - a.real * b.imag) / d};
}
constexpr complex64_t operator-(complex64_t a, complex64_t b) {
  return {a.real - b.real, a.imag - b.imag};
}
constexpr complex64_t operator-(complex64_t a) { return {-a.real, -a.imag}; }
inline complex64_t operator%(complex64_t a, complex64_t b) {
  complex64_t q = a / b;
  return a - b * complex64_t(metal::trunc(q.real), metal::trunc(q.imag));
}
constexpr bool operator==(complex64_t a, complex64_t b) {
  return a.real == b.real && a.imag == b.imag;
}
constexpr bool operator<(complex64_t a, complex64_t b) {
  return a.real < b.real || (a.real == b.real && a.imag < b.imag);
}
constexpr bool operator>(complex64_t a, complex64_t b) { return b < a; }
constexpr bool operator<=(complex64_t a, complex64_t b) { return !(b < a); }
constexpr bool operator>=(complex64_t a, complex64_t b) { return !(a < b); }
