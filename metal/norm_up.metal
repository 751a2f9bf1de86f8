// Up projection of DECO's experts (arXiv 2605.10933), from the router's logits: scores, the union
// and h = score * silu(RMSNorm(x up^T - mean) * norm) in one launch.
#include <metal_stdlib>
#include "route.metal"
#include "up.metal"
using namespace metal;

// Scores that are finished where they are read.
template <typename T, int EXPERTS, typename Logits, typename Scale>
struct ScaledScores {
  Logits logits;  // [tokens, EXPERTS + 1]
  Scale scale;    // [EXPERTS]

  float operator[](uint i) const thread {
    const uint expert = i % EXPERTS;
    const float active = positive(float(logits[i / EXPERTS * (EXPERTS + 1) + expert]));
    return float(T(active * float(scale[expert])));
  }
};

// The norm needs an expert's whole width, so a threadgroup takes an expert: SIDE of its simdgroups
// stand side by side along the rows, the others behind them share k. The threadgroups go round the
// experts of the union; `group` of `groups` may find none.
//   x: [tokens, HIDDEN]   up: [EXPERTS, EXPERT_SIZE, HIDDEN]   scale: [EXPERTS]
//   logits: [tokens, EXPERTS + 1]; the last is the mean over all experts' outputs
//   norm: [EXPERT_SIZE]   eps: [4], all the same   active, h: as up_projection leaves them
template <
    typename T, bool MATRIX, int TOKENS, int OCTETS, int SIMDGROUPS, int DEPTH, bool AHEAD,
    int EXPERTS, int HIDDEN, int EXPERT_SIZE, typename Weights, typename Logits, typename Scale,
    typename Norm, typename Eps>
void norm_up_projection(
    const device T* x, Logits logits, Scale scale, Norm norm, Eps eps, Weights up, device T* h,
    device uint* active, uint tokens, threadgroup uint* masks, threadgroup ushort* list,
    threadgroup float* partials, uint group, uint groups, uint simdgroup, uint lane) {
  const int ROWS = 8 * OCTETS, TILES = EXPERT_SIZE / ROWS;
  const int MOST = TILES < SIMDGROUPS ? TILES : SIMDGROUPS;
  const int SIDE = MOST >= 8 ? 8 : MOST >= 4 ? 4 : MOST >= 2 ? 2 : 1, SHARES = SIMDGROUPS / SIDE;
  const int PART = SHARES * TOKENS * Partials<ROWS>::stride;
  // What a lane keeps until the width is whole: rows lane, lane + 32, ... of some tokens.
  const int LANE_ROWS = EXPERT_SIZE / 32, LANE_TOKENS = (TOKENS + SIMDGROUPS - 1) / SIMDGROUPS;
  const uint side = simdgroup / SHARES, share = simdgroup % SHARES;
  const ScaledScores<T, EXPERTS, Logits, Scale> scores = {logits, scale};
  const uint count = list_active_experts<EXPERTS, TOKENS, SIMDGROUPS>(
      scores, tokens, masks, list, simdgroup, lane);
  if (group == 0) {
    for (uint i = simdgroup * 32 + lane; i <= EXPERTS; i += SIMDGROUPS * 32) {
      active[i] = i == 0 ? count : i <= count ? list[i - 1] : 0;
    }
  }

  for (uint slot = group; slot < count; slot += groups) {
    const uint expert = list[slot];
    float values[LANE_TOKENS][LANE_ROWS];
    for (uint first = 0; first < uint(TILES); first += SIDE) {
      if (first + side < uint(TILES)) {
        const uint row = (first + side) * ROWS;
        const UpOperands<T, HIDDEN> operands = {
            x, tokens, ulong(expert) * EXPERT_SIZE + row, HIDDEN};
        Tile<MATRIX, T, Weights, OCTETS, TOKENS> tile;
        stream_rows<OCTETS, SHARES, DEPTH, AHEAD>(tile, up, operands, share, lane);
        store_partials<TOKENS, ROWS>(tile, partials + side * PART, share, lane);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
      for (int n = 0; n < LANE_TOKENS; ++n) {
        const uint token = n * SIMDGROUPS + simdgroup;
        if (token < tokens) {
          const float mean = float(logits[token * (EXPERTS + 1) + EXPERTS]);
#pragma unroll
          for (int i = 0; i < SIDE * ROWS / 32; ++i) {
            const uint row = 32 * i + lane, at = first * ROWS / 32 + i;
            if (at < uint(LANE_ROWS)) {
              const threadgroup float* part = partials + row / ROWS * PART;
              values[n][at] = add_partials<SHARES, TOKENS, ROWS>(part, token, row % ROWS) - mean;
            }
          }
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the partials have been read
    }

#pragma unroll
    for (int n = 0; n < LANE_TOKENS; ++n) {
      const uint token = n * SIMDGROUPS + simdgroup;
      if (token < tokens) {
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i) {
          squares += values[n][i] * values[n][i];
        }
        const float factor = rsqrt(simd_sum(squares) / EXPERT_SIZE + eps[0]);
        const float score = scores[token * EXPERTS + expert];
        device T* units = h + (slot * tokens + token) * EXPERT_SIZE + lane;
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i) {
          const float normed = values[n][i] * factor * float(norm[32 * i + lane]);
          // Not a product with 0: what is not asked for may be anything.
          units[32 * i] = T(score != 0.0f ? activate(normed, true) * score : 0.0f);
        }
      }
    }
  }
}
