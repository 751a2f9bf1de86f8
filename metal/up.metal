// Up projection of the union's experts: h = score * act(x up^T), 0 where the score is 0.
#pragma once
#include <metal_stdlib>
#include "staged_tokens.metal"
#include "tile.metal"
#include "union.metal"
using namespace metal;

// What the tile multiplies: rows of one expert by the tokens of the chunk.
template <typename T, int HIDDEN>
struct UpOperands {
  const device T* x;  // [tokens, HIDDEN]
  uint tokens;
  ulong first_row;  // of up as [experts * EXPERT_SIZE, HIDDEN]
  uint length;      // HIDDEN
  enum { COLUMNS = HIDDEN };

  void prepare(uint, uint) const thread {}

  template <int OCTETS, typename Weights>
  void load_rows(thread typename Weights::Span* out, Weights up, uint row, uint k) const thread {
    if (k < uint(HIDDEN)) {
      const Weights rows = up.from_row(first_row + row, HIDDEN);
#pragma unroll
      for (int i = 0; i < OCTETS; ++i) {
        rows.load(out[i], 8 * i, k, HIDDEN);
      }
    } else {
#pragma unroll
      for (int i = 0; i < OCTETS; ++i) {
        Weights::clear(out[i]);
      }
    }
  }

  const device T* tokens_at(uint k) const thread { return x + k; }

  // Tokens past the last repeat it; nobody reads their columns.
  template <int WORDS>
  void load_token(thread uint* out, uint token, uint k) const thread {
    if (k < uint(HIDDEN)) {
      copy_words<WORDS>(out, (const device uint*)(x + (min(token, tokens - 1) * HIDDEN + k)));
    } else {
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
        out[i] = 0;
      }
    }
  }
};

// Of NaN it makes NaN.
inline float activate(float z, bool silu) {
  return silu ? z / (1.0f + exp(-z)) : z <= 0.0f ? 0.0f : z;
}

// The threadgroups go round the tiles of 8 * OCTETS rows of the union's experts; `group` of
// `groups` may find none.
//   x: [tokens, HIDDEN]   scores: [tokens, EXPERTS]   up: [EXPERTS, EXPERT_SIZE, HIDDEN]
//   active: [1 + EXPERTS], the count of active experts, the ascending list of them, and zeros
//   h: [EXPERTS, tokens, EXPERT_SIZE], slot i for the i-th active expert; later ones stay unwritten
template <
    typename T, bool MATRIX, int TOKENS, int OCTETS, int SIMDGROUPS, int DEPTH, bool AHEAD,
    int EXPERTS, int HIDDEN, int EXPERT_SIZE, bool SILU, typename Weights, typename Scores,
    typename Source>
void up_projection(
    const device T* x, Scores scores, Weights up, device T* h, device uint* active, uint tokens,
    threadgroup uint* masks, threadgroup ushort* list, threadgroup float* partials, Source source,
    uint group, uint groups, uint simdgroup, uint lane) {
  const int ROWS = 8 * OCTETS, TILES = EXPERT_SIZE / ROWS;
  const uint count = list_active_experts<EXPERTS, TOKENS, SIMDGROUPS>(
      scores, tokens, masks, list, simdgroup, lane);
  if (group == 0) {
    for (uint i = simdgroup * 32 + lane; i <= EXPERTS; i += SIMDGROUPS * 32) {
      active[i] = i == 0 ? count : i <= count ? list[i - 1] : 0;
    }
  }

  for (uint i = group; i < count * TILES; i += groups) {
    const uint slot = i / TILES, first_row = i % TILES * ROWS, expert = list[slot];
    typedef UpOperands<T, HIDDEN> Operands;
    const ulong expert_row = ulong(expert) * EXPERT_SIZE + first_row;
    const Operands operands = {x, tokens, expert_row, HIDDEN};
    Tile<MATRIX, T, Weights, OCTETS, TOKENS> tile;
    stream_rows<OCTETS, SIMDGROUPS, DEPTH, AHEAD>(tile, up, operands, simdgroup, lane, source);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the last tile's partials have been read
    store_partials<TOKENS, ROWS>(tile, partials, simdgroup, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    for (uint j = simdgroup * 32 + lane; j < tokens * ROWS; j += SIMDGROUPS * 32) {
      const uint token = j / ROWS, row = j % ROWS;
      const float score = float(scores[token * EXPERTS + expert]);
      const float z = add_partials<SIMDGROUPS, TOKENS, ROWS>(partials, token, row);
      // Not a product with 0: the activation may be infinite.
      const float value = score != 0.0f ? activate(z, SILU) * score : 0.0f;
      h[(slot * tokens + token) * EXPERT_SIZE + first_row + row] = T(value);
    }
  }
}
