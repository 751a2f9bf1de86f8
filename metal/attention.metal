// Attention of a short chunk over a cache, read where it lies.
#include <metal_stdlib>
#include "simdgroup.metal"
using namespace metal;

// Neighbouring elements as float, in pieces of 16 bytes where that fits.
template <typename T, int COUNT>
inline void load_row(thread float* row, const device T* source) {
  const int WORDS = COUNT * sizeof(T) / 4;
  if (WORDS % 4 == 0) {
    uint words[WORDS];
    copy_words<WORDS>(words, (const device uint*)source);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      row[i] = element(words, i, T(0));
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      row[i] = float(source[i]);
    }
  }
}

// One threadgroup: a token and ROWS query heads that share a key head. Its simdgroups take the keys
// in turn, each with a softmax of its own, and join them at the end.
//   queries: [batch, heads, tokens, DIMS]   keys, values: [batch, kv_heads, capacity, DIMS]
//   With a ROTARY part, MLA: keys hold the latent, which is the values too; `values` hold rotary
//   keys [batch, kv_heads, capacity, ROTARY], and `rotary` queries [batch, heads, tokens, ROTARY].
//   span: [3], the rows of the cache; those of them that every token may look at; and how many
//   behind these it may look at if their bit in `window` is set
//   mask: nothing if MASK is 0, causal; [1 or batch, tokens, rows] if it is 1; if it is 2, bit j of
//   words [2, tokens] for row j behind the window
//   scale: [4], all the same   y: [batch, tokens, heads, DIMS]
//   parts: [SIMDGROUPS * ROWS * DIMS], weights: [SIMDGROUPS * ROWS * 2], scratch
template <
    typename T, int DIMS, int ROTARY, int ROWS, int SIMDGROUPS, int MASK, typename Mask,
    typename Span, typename Window, typename Scale>
void attend_chunk(
    const device T* queries, const device T* rotary, const device T* keys, const device T* values,
    Mask mask, Span span, Window window, Scale scale, device T* y, uint heads, uint kv_heads, uint tokens,
    uint capacity, uint masks, threadgroup float* parts, threadgroup float* weights, uint group,
    uint simdgroup, uint lane) {
  // LANES share a key, EACH dimensions a lane, so that a simdgroup takes KEYS at a time.
  const int LANES = DIMS == 96 ? 16 : DIMS / 8, EACH = DIMS / LANES, KEYS = 32 / LANES;
  const int TURNED = ROTARY / LANES;
  const float LOWEST = -3.0e38f;
  const uint token = group % tokens, blocks = heads / ROWS, block = group / tokens % blocks;
  const uint batch = group / tokens / blocks, first_head = batch * heads + block * ROWS;
  const uint kv_head = batch * kv_heads + block * ROWS / (heads / kv_heads);
  const uint count = span[0], open = span[1], nodes = open + span[2];
  const uint part = lane % LANES;
  const ulong first_key = ulong(kv_head) * capacity;

  float query[ROWS][EACH], turned[ROWS][TURNED + 1], sum[ROWS][EACH], largest[ROWS], total[ROWS];
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    const uint at = (first_head + row) * tokens + token;
    largest[row] = LOWEST;
    total[row] = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      query[row][i] = scale[0] * float(queries[at * DIMS + part * EACH + i]);
      sum[row][i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < TURNED; ++i) {
      turned[row][i] = scale[0] * float(rotary[at * ROTARY + part * TURNED + i]);
    }
  }

  // No branch depends on a key, so that loads of several may be on their way.
  const uint end = MASK == 0 ? count - tokens + token + 1 : count;
#pragma unroll 2
  for (uint first = simdgroup * KEYS; first < end; first += SIMDGROUPS * KEYS) {
    const uint own = first + lane / LANES, k = own < end ? own : 0;
    bool seen = own < end;
    if (MASK == 1) {
      seen = seen && mask[((masks > 1 ? batch : 0) * tokens + token) * count + k];
    }
    if (MASK == 2 && k >= open) {
      const uint bit = k < nodes ? k - open : k - nodes;
      const uint word = k < nodes ? window[bit / 32] : uint(mask[bit / 32 * tokens + token]);
      seen = seen && (word >> bit % 32 & 1u);
    }
    const ulong place = first_key + k;
    float key[EACH], value[EACH], other[TURNED + 1];
    load_row<T, EACH>(key, keys + (place * DIMS + part * EACH));
    if (ROTARY == 0) {
      load_row<T, EACH>(value, values + (place * DIMS + part * EACH));
    }
#pragma unroll
    for (int i = 0; i < TURNED; ++i) {
      other[i] = float(values[place * ROTARY + part * TURNED + i]);
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      value[i] = seen ? (ROTARY ? key[i] : value[i]) : 0.0f;  // 0 times what is unseen may be NaN
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
#pragma unroll
      for (int step = LANES / 2; step > 0; step /= 2) {
        score += simd_shuffle_xor(score, ushort(step));
      }
      score = seen ? score : LOWEST;
      const float now = max(largest[row], score), kept = exp(largest[row] - now);
      const float weight = seen ? exp(score - now) : 0.0f;
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
    float now = largest[row];
#pragma unroll
    for (int step = LANES; step < 32; step *= 2) {
      now = max(now, simd_shuffle_xor(now, ushort(step)));
    }
    const float share = exp(largest[row] - now);
    total[row] *= share;
#pragma unroll
    for (int step = LANES; step < 32; step *= 2) {
      total[row] += simd_shuffle_xor(total[row], ushort(step));
    }
    if (lane == 0) {
      weights[2 * at] = now;
      weights[2 * at + 1] = total[row];
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      float joined = sum[row][i] * share;
#pragma unroll
      for (int step = LANES; step < 32; step *= 2) {
        joined += simd_shuffle_xor(joined, ushort(step));
      }
      if (lane < LANES) {
        parts[at * DIMS + part * EACH + i] = joined;
      }
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
