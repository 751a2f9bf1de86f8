// The likeliest tokens of each row of logits, best first, and their log-probabilities.
#include <metal_stdlib>
#include "simdgroup.metal"
using namespace metal;

#define NOTHING 0xffffffffu

// Whether logit a at place i comes before logit b at place j.
inline bool comes_first(float a, uint i, float b, uint j) {
  return a > b || (a == b && i < j);
}

// The best (value, place) of a simdgroup, known to all its lanes.
inline void best_of_simdgroup(thread float* value, thread uint* at) {
  for (ushort mask = 16; mask > 0; mask /= 2) {
    const float other = simd_shuffle_xor(*value, mask);
    const uint other_at = simd_shuffle_xor(*at, mask);
    if (comes_first(other, other_at, *value, *at)) {
      *value = other;
      *at = other_at;
    }
  }
}

// One threadgroup a row. Every lane knows the best two of the logits that it walks over; the lane
// whose best is taken moves up, and looks again when it has none left.
//   logits: [rows, vocab]   frequent: [vocab], what a place stands for if MAPPED
//   tokens, logprobs: [rows, TOP]   values, places: [SIMDGROUPS], scratch
template <typename T, int TOP, bool MAPPED, int SIMDGROUPS, typename Logits, typename Frequent>
void top_tokens(
    Logits logits, Frequent frequent, device uint* tokens, device float* logprobs, uint vocab,
    threadgroup float* values, threadgroup uint* places, uint row, uint simdgroup, uint lane) {
  const float LOWEST = -3.0e38f;
  const uint first = simdgroup * 32 + lane;
  const ulong start = ulong(row) * vocab;
  float value = LOWEST, second = LOWEST;
  uint at = NOTHING, second_at = NOTHING;
  for (uint i = first; i < vocab; i += SIMDGROUPS * 32) {
    const float logit = float(logits[start + i]);
    if (logit > value) {
      second = value;
      second_at = at;
      value = logit;
      at = i;
    } else if (logit > second) {
      second = logit;
      second_at = i;
    }
  }
  float largest = 0.0f, total = 1.0f;
  for (int k = 0; k < TOP; ++k) {
    float best = value;
    uint best_at = at;
    best_of_simdgroup(&best, &best_at);
    if (lane == 0) {
      values[simdgroup] = best;
      places[simdgroup] = best_at;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    best = values[lane % SIMDGROUPS];
    best_at = places[lane % SIMDGROUPS];
    best_of_simdgroup(&best, &best_at);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (k == 0) {
      largest = best;
      float sum = 0.0f;
      for (uint i = first; i < vocab; i += SIMDGROUPS * 32) {
        sum += exp(float(logits[start + i]) - largest);
      }
      sum = simd_sum(sum);
      if (lane == 0) {
        values[simdgroup] = sum;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      total = simd_sum(lane < SIMDGROUPS ? values[lane] : 0.0f);
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (first == 0) {
      const uint found = best_at < vocab ? best_at : 0;  // what is no number is never found
      const float logprob = best - largest - log(total);
      tokens[row * TOP + k] = MAPPED ? uint(frequent[found]) : found;
      logprobs[row * TOP + k] = logprob <= 0.0f && logprob > LOWEST ? logprob : LOWEST;
    }
    if (best_at == at && at != NOTHING) {
      value = second;
      at = second_at;
      second = LOWEST;
      second_at = NOTHING;
      if (at == NOTHING) {
        for (uint i = first; i < vocab; i += SIMDGROUPS * 32) {
          const float logit = float(logits[start + i]);
          if (logit > value && comes_first(best, best_at, logit, i)) {
            value = logit;
            at = i;
          }
        }
      }
    }
  }
}
