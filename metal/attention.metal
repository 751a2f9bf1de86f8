// Attention of a short chunk over a cache, read where it lies.
#include <metal_stdlib>
#include "simdgroup.metal"
using namespace metal;

// One threadgroup: a token and the ROWS query heads that share a key head. Its simdgroups take the
// keys in turn, each with a softmax of its own, and join them at the end.
//   queries: [batch, heads, tokens, DIMS]   keys, values: [batch, heads / ROWS, capacity, DIMS]
//   mask: [1 or batch, tokens, length], where CAUSAL does not stand for it   length, scale: [1]
//   y: [batch, tokens, heads, DIMS]
//   parts: [SIMDGROUPS * ROWS * DIMS], weights: [SIMDGROUPS * ROWS * 2], scratch
template <
    typename T, int DIMS, int ROWS, int SIMDGROUPS, bool CAUSAL, typename Mask, typename Length,
    typename Scale>
void attend_chunk(
    const device T* queries, const device T* keys, const device T* values, Mask mask,
    Length length, Scale scale, device T* y, uint kv_heads, uint tokens, uint capacity,
    uint masks, threadgroup float* parts, threadgroup float* weights, uint group, uint simdgroup,
    uint lane) {
  const int EACH = DIMS / 32;
  const float LOWEST = -3.0e38f;
  const uint token = group % tokens, kv_head = group / tokens % kv_heads;
  const uint batch = group / tokens / kv_heads, count = length[0];
  const ulong first_key = ulong(batch * kv_heads + kv_head) * capacity * DIMS;

  float query[ROWS][EACH], sum[ROWS][EACH], largest[ROWS], total[ROWS];
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    const uint head = (batch * kv_heads + kv_head) * ROWS + row;
    largest[row] = LOWEST;
    total[row] = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      query[row][i] = scale[0] * float(queries[(head * tokens + token) * DIMS + lane * EACH + i]);
      sum[row][i] = 0.0f;
    }
  }

  const uint end = CAUSAL ? count - tokens + token + 1 : count;
  for (uint k = simdgroup; k < end; k += SIMDGROUPS) {
    if (!CAUSAL && !mask[((masks > 1 ? batch : 0) * tokens + token) * count + k]) {
      continue;
    }
    float key[EACH], value[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      key[i] = float(keys[first_key + k * DIMS + lane * EACH + i]);
      value[i] = float(values[first_key + k * DIMS + lane * EACH + i]);
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      float score = 0.0f;
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        score += query[row][i] * key[i];
      }
      score = simd_sum(score);
      const float now = max(largest[row], score), kept = exp(largest[row] - now);
      const float weight = exp(score - now);
      largest[row] = now;
      total[row] = total[row] * kept + weight;
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        sum[row][i] = sum[row][i] * kept + weight * value[i];
      }
    }
  }

#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    const uint at = simdgroup * ROWS + row;
    if (lane == 0) {
      weights[2 * at] = largest[row];
      weights[2 * at + 1] = total[row];
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      parts[at * DIMS + lane * EACH + i] = sum[row][i];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint j = simdgroup * 32 + lane; j < ROWS * DIMS; j += SIMDGROUPS * 32) {
    const uint row = j / DIMS;
    float now = LOWEST;
    for (int i = 0; i < SIMDGROUPS; ++i) {
      now = max(now, weights[2 * (i * ROWS + row)]);
    }
    float over = 0.0f, under = 0.0f;
    for (int i = 0; i < SIMDGROUPS; ++i) {
      const uint at = i * ROWS + row;
      const float share = exp(weights[2 * at] - now);
      over += share * parts[at * DIMS + j % DIMS];
      under += share * weights[2 * at + 1];
    }
    // A token that may look at nothing gets 0.
    y[((batch * tokens + token) * kv_heads + kv_head) * ROWS * DIMS + j] =
        T(under > 0.0f ? over / under : under);
  }
}
