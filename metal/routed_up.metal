// Up projection that makes its own scores: `route` and `up` in one launch.
#include <metal_stdlib>
#include "route.metal"
#include "up.metal"
using namespace metal;

// Scores that are finished where they are read.
template <typename T, int EXPERTS, typename Logits, typename Weight>
struct RoutedScores {
  Logits logits;  // [tokens, EXPERTS]
  Weight weight;  // [EXPERTS]
  const threadgroup float* factors;  // [tokens]

  float operator[](uint i) const thread {
    return finish_score<T>(float(logits[i]), factors[i / EXPERTS], float(weight[i % EXPERTS]));
  }
};

// As up_projection, from the router's logits; every threadgroup norms the chunk for itself.
//   logits: [tokens, EXPERTS]   norm: [EXPERTS]   eps: [4], all the same   factors: [TOKENS], scratch
template <
    typename T, bool MATRIX, int TOKENS, int OCTETS, int SIMDGROUPS, int DEPTH, bool AHEAD,
    int EXPERTS, int HIDDEN, int EXPERT_SIZE, bool SILU, typename Weights, typename Logits,
    typename Norm, typename Eps, typename Source>
void routed_up_projection(
    const device T* x, Logits logits, Norm norm, Eps eps, Weights up, device T* h,
    device uint* active, uint tokens, threadgroup float* factors, threadgroup uint* masks,
    threadgroup ushort* list, threadgroup float* partials, Source source, uint group, uint groups,
    uint simdgroup, uint lane) {
  for (uint token = simdgroup; token < tokens; token += SIMDGROUPS) {
    const float factor = norm_factor<EXPERTS>(logits, eps, token, lane);
    if (lane == 0) {
      factors[token] = factor;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const RoutedScores<T, EXPERTS, Logits, Norm> scores = {logits, norm, factors};
  up_projection<
      T, MATRIX, TOKENS, OCTETS, SIMDGROUPS, DEPTH, AHEAD, EXPERTS, HIDDEN, EXPERT_SIZE, SILU>(
      x, scores, up, h, active, tokens, masks, list, partials, source, group, groups, simdgroup,
      lane);
}
