// stands in for mlx/backend/metal/kernels/steel/utils/type_traits.h, which has one specialisation
// per address space: without -DMSL_AS they would all be the same type
#pragma once
namespace metal {
template <class T>
struct msl_plain {
  using type = T;
};
#ifdef MSL_AS
template <class T>
struct msl_plain<T MSL_ASQ(1)> {
  using type = T;
};
template <class T>
struct msl_plain<T MSL_ASQ(2)> {
  using type = T;
};
template <class T>
struct msl_plain<T MSL_ASQ(3)> {
  using type = T;
};
#endif
template <class P>
struct msl_pointee;
template <class T>
struct msl_pointee<T*> {
  using type = remove_cv_t<typename msl_plain<remove_cv_t<T>>::type>;
};
template <class P>
using pointer_element_t = typename msl_pointee<remove_cv_t<P>>::type;
template <class T>
struct is_static : bool_constant<__is_empty(remove_cv_t<T>)> {};
}  // namespace metal
