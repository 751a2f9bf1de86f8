// Down projection that adds its result to the residual stream: `down` and two operations in one.
#include <metal_stdlib>
#include "down.metal"
using namespace metal;

// residual + factor * sum, rounded once.
//   residual: [tokens, HIDDEN]   factor: [4], all the same
template <typename Residual, typename Factor>
struct AddedToResidual {
  Residual residual;
  Factor factor;

  float operator()(uint i, float sum) const thread {
    return float(residual[i]) + factor[0] * sum;
  }
};

template <typename Residual, typename Factor>
inline AddedToResidual<Residual, Factor> added_to(Residual residual, Factor factor) {
  return {residual, factor};
}
