// Up projection of the union's experts: h = score * act(x up^T), 0 where the score is 0.
#include <metal_stdlib>
#include "tile.metal"
#include "union.metal"
using namespace metal;

// What the tile multiplies: rows of one expert by the tokens of the chunk.
template <typename T, int HIDDEN, int SPAN>
struct UpOperands {
  const device T* x;  // [tokens, HIDDEN]
  uint tokens;
  uint first_row;  // of up as [experts * EXPERT_SIZE, HIDDEN]
  uint length;     // HIDDEN

  template <int OCTETS, typename Weights>
  void load_rows(thread typename Weights::Span* out, Weights up, uint row, uint k) const {
#pragma unroll
    for (int i = 0; i < OCTETS; ++i) {
      if (k < uint(HIDDEN)) {
        up.load(out[i], first_row + 8 * i + row, k, HIDDEN);
      } else {
        Weights::clear(out[i]);
      }
    }
  }

  // Tokens past the last repeat it; nobody reads their columns.
  template <int WORDS>
  void load_token(thread uint* out, uint token, uint k) const {
    if (HIDDEN % (4 * SPAN) == 0 || k < uint(HIDDEN)) {
      copy_words<WORDS>(out, (const device uint*)(x + (min(token, tokens - 1) * HIDDEN + k)));
    } else {
      for (int i = 0; i < WORDS; ++i) {
        out[i] = 0;
      }
    }
  }
};

inline float activate(float z, bool silu) {
  return silu ? z / (1.0f + exp(-z)) : max(z, 0.0f);
}

// One threadgroup: rows [tile * 8 * OCTETS, ...) of the expert in one slot of the union.
//   x: [tokens, HIDDEN]   scores: [tokens, experts]   up: [experts, EXPERT_SIZE, HIDDEN]
//   h: [slots, tokens, EXPERT_SIZE], slot i for the i-th active expert; later slots stay unwritten
//   down: the bytes of the down projection, which the first PREFETCH slots ask for ahead of time
template <
    typename T, bool MATRIX, int TOKENS, int OCTETS, int SIMDGROUPS, int DEPTH, int HIDDEN,
    int EXPERT_SIZE, bool SILU, int PREFETCH, int DOWN_BYTES, typename Weights, typename Scores>
void up_projection(
    const device T* x, Scores scores, Weights up, const device uchar* down, device T* h,
    uint tokens, uint experts, threadgroup uint* masks, threadgroup ushort* list,
    threadgroup float* partials, uint group, uint simdgroup, uint lane) {
  const int ROWS = 8 * OCTETS;
  const uint count = list_active_experts<SIMDGROUPS>(
      scores, tokens, experts, masks, list, simdgroup, lane);
  const uint slot = group / (EXPERT_SIZE / ROWS), first_row = group % (EXPERT_SIZE / ROWS) * ROWS;
  if (slot >= count) {
    return;
  }
  const uint expert = list[slot];

  typedef UpOperands<T, HIDDEN, Weights::span> Operands;
  const Operands operands = {x, tokens, expert * EXPERT_SIZE + first_row, HIDDEN};
  Tile<MATRIX, T, Weights, OCTETS, TOKENS> tile;
  stream_rows<OCTETS, SIMDGROUPS, DEPTH>(tile, up, operands, simdgroup, lane);
  if (slot < uint(PREFETCH) && simdgroup == 0 && lane == 0) {
    const uint share = uint(DOWN_BYTES) / EXPERT_SIZE * ROWS;
    prefetch(down + (ulong(expert) * DOWN_BYTES + first_row / ROWS * share), share);
  }
  tile.store(
      partials + simdgroup * TOKENS * Partials<ROWS>::stride, Partials<ROWS>::stride,
      lane_row(lane), lane_quarter(lane));
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (uint i = simdgroup * 32 + lane; i < tokens * ROWS; i += SIMDGROUPS * 32) {
    const uint token = i / ROWS, row = i % ROWS;
    const float score = float(scores[token * experts + expert]);
    const float z = add_partials<SIMDGROUPS, TOKENS, ROWS>(partials, token, row);
    // Not a product with 0: the activation may be infinite.
    const float value = score != 0.0f ? activate(z, SILU) * score : 0.0f;
    h[(slot * tokens + token) * EXPERT_SIZE + first_row + row] = T(value);
  }
}
