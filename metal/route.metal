// Router scores from the router's logits: ReLU, RMSNorm over the experts, weight.
#pragma once
#include <metal_stdlib>
#include "simdgroup.metal"
using namespace metal;

// ReLU, of NaN NaN, which max would drop.
inline float positive(float logit) {
  return logit <= 0.0f ? 0.0f : logit;
}

// What RMSNorm multiplies a token's active logits by; all lanes of a simdgroup call this.
template <int EXPERTS, typename Logits, typename Eps>
inline float norm_factor(Logits logits, Eps eps, uint token, uint lane) {
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < (EXPERTS + 31) / 32; ++i) {
    const uint expert = i * 32 + lane;
    if (expert < EXPERTS) {
      const float active = positive(float(logits[token * EXPERTS + expert]));
      squares += active * active;
    }
  }
  return rsqrt(simd_sum(squares) / EXPERTS + eps[0]);
}

// A finished score. Rounds where separate operations would: after the norm and at the end.
template <typename T>
inline float finish_score(float logit, float factor, float weight) {
  const float normed = float(T(positive(logit) * factor));
  return float(T(normed * weight));
}

// One simdgroup a token.
//   logits: [tokens, EXPERTS]   weight: [EXPERTS]   eps: [4], all the same   scores: [tokens, EXPERTS]
template <typename T, int EXPERTS, typename Logits, typename Weight, typename Eps>
void route_token(
    Logits logits, Weight weight, Eps eps, device T* scores, uint token, uint lane) {
  const float factor = norm_factor<EXPERTS>(logits, eps, token, lane);
#pragma unroll
  for (int i = 0; i < (EXPERTS + 31) / 32; ++i) {
    const uint expert = i * 32 + lane;
    if (expert < EXPERTS) {
      const uint at = token * EXPERTS + expert;
      scores[at] = T(finish_score<T>(float(logits[at]), factor, float(weight[expert])));
    }
  }
}
