// Attention of a short chunk over a cache, read where it lies.
#include <metal_stdlib>
#include "simdgroup.metal"
using namespace metal;

// One threadgroup: a token and ROWS query heads that share a key head. Its simdgroups take the keys
// in turn, each with a softmax of its own, and join them at the end.
//   queries: [batch, heads, tokens, DIMS]   keys, values: [batch, kv_heads, capacity, DIMS]
//   With a ROTARY part, MLA: keys hold the latent, which is the values too; `values` hold rotary
//   keys [batch, kv_heads, capacity, ROTARY], and `rotary` queries [batch, heads, tokens, ROTARY].
//   span: [3], the rows of the cache; those of them that every token may look at; and how many
//   behind these it may look at if their bit in `window` is set
//   mask: nothing if MASK is 0, causal; [1 or batch, tokens, rows] if it is 1; if it is 2, bit j of
//   words [2, tokens] for row j behind the window
//   scale: [1]   y: [batch, tokens, heads, DIMS]
//   parts: [SIMDGROUPS * ROWS * DIMS], weights: [SIMDGROUPS * ROWS * 2], scratch
template <
    typename T, int DIMS, int ROTARY, int ROWS, int SIMDGROUPS, int MASK, typename Mask,
    typename Span, typename Window, typename Scale>
void attend_chunk(
    const device T* queries, const device T* rotary, const device T* keys, const device T* values,
    Mask mask, Span span, Window window, Scale scale, device T* y, uint heads, uint kv_heads, uint tokens,
    uint capacity, uint masks, threadgroup float* parts, threadgroup float* weights, uint group,
    uint simdgroup, uint lane) {
  const int EACH = DIMS / 32, TURNED = ROTARY / 32;
  const float LOWEST = -3.0e38f;
  const uint token = group % tokens, blocks = heads / ROWS, block = group / tokens % blocks;
  const uint batch = group / tokens / blocks, first_head = batch * heads + block * ROWS;
  const uint kv_head = batch * kv_heads + block * ROWS / (heads / kv_heads);
  const uint count = span[0], open = span[1], nodes = open + span[2];
  const ulong first_key = ulong(kv_head) * capacity;

  float query[ROWS][EACH], turned[ROWS][TURNED + 1], sum[ROWS][EACH], largest[ROWS], total[ROWS];
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    const uint at = (first_head + row) * tokens + token;
    largest[row] = LOWEST;
    total[row] = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      query[row][i] = scale[0] * float(queries[at * DIMS + lane * EACH + i]);
      sum[row][i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < TURNED; ++i) {
      turned[row][i] = scale[0] * float(rotary[at * ROTARY + lane * TURNED + i]);
    }
  }

  const uint end = MASK == 0 ? count - tokens + token + 1 : count;
  for (uint k = simdgroup; k < end; k += SIMDGROUPS) {
    if (MASK == 1 && !mask[((masks > 1 ? batch : 0) * tokens + token) * count + k]) {
      continue;
    }
    if (MASK == 2 && k >= open) {
      const uint bit = k < nodes ? k - open : k - nodes;
      const uint word = k < nodes ? window[bit / 32] : uint(mask[bit / 32 * tokens + token]);
      if (!(word >> bit % 32 & 1u)) {
        continue;
      }
    }
    const ulong place = first_key + k;
    float key[EACH], value[EACH], other[TURNED + 1];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      key[i] = float(keys[place * DIMS + lane * EACH + i]);
      value[i] = ROTARY ? key[i] : float(values[place * DIMS + lane * EACH + i]);
    }
#pragma unroll
    for (int i = 0; i < TURNED; ++i) {
      other[i] = float(values[place * ROTARY + lane * TURNED + i]);
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      float score = 0.0f;
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        score += query[row][i] * key[i];
      }
#pragma unroll
      for (int i = 0; i < TURNED; ++i) {
        score += turned[row][i] * other[i];
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
    y[((batch * tokens + token) * heads + block * ROWS) * DIMS + j] =
        T(under > 0.0f ? over / under : under);
  }
}
