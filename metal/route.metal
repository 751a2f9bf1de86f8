// Router scores from the router's logits: ReLU, RMSNorm over the experts, weight.
#include <metal_stdlib>
#include "simdgroup.metal"
using namespace metal;

// One simdgroup a token. Rounds where separate operations would: after the norm and at the end.
//   logits: [tokens, EXPERTS]   weight: [EXPERTS]   eps: [1]   scores: [tokens, EXPERTS]
template <typename T, int EXPERTS, typename Logits, typename Weight, typename Eps>
void route_token(
    Logits logits, Weight weight, Eps eps, device T* scores, uint token, uint lane) {
  const int EACH = (EXPERTS + 31) / 32;
  float active[EACH];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const uint expert = i * 32 + lane;
    const float logit = expert < EXPERTS ? float(logits[token * EXPERTS + expert]) : 0.0f;
    active[i] = logit <= 0.0f ? 0.0f : logit;  // not max, which would drop a NaN
    squares += active[i] * active[i];
  }
  const float scale = rsqrt(simd_sum(squares) / EXPERTS + eps[0]);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const uint expert = i * 32 + lane;
    if (expert < EXPERTS) {
      const float normed = float(T(active[i] * scale));
      scores[token * EXPERTS + expert] = T(normed * float(weight[expert]));
    }
  }
}
