// The first half of a gated MLP of normed tokens, silu(RMSNorm(x) G^T) * RMSNorm(x) U^T, in one
// launch: DECO's shared expert and dense layers.
#include <metal_stdlib>
#include "normed.metal"
using namespace metal;

// As NormedOperands; the first HALF rows of a tile are gates, the others what these gate.
template <typename T, int SIMDGROUPS, int WIDTH, int HALF, int OUTPUTS, typename Eps>
struct GatedOperands {
  NormedOperands<T, SIMDGROUPS, WIDTH, Eps> normed;
  uint length;  // WIDTH

  void prepare(uint simdgroup, uint lane) const thread { normed.prepare(simdgroup, lane); }

  template <int OCTETS, typename Weights>
  void load_rows(
      thread typename Weights::Span* out, Weights matrix, uint row, uint k) const thread {
#pragma unroll
    for (int i = 0; i < OCTETS; ++i) {
      const uint at = 8 * i + row, other = at < uint(HALF) ? 0 : OUTPUTS - HALF;
      if (k < uint(WIDTH)) {
        const Weights rows = matrix.from_row(normed.plain.first_row + at + other, WIDTH);
        rows.load(out[i], 0, k, WIDTH);
      } else {
        Weights::clear(out[i]);
      }
    }
  }

  template <int WORDS>
  void load_token(thread uint* out, uint token, uint k) const thread {
    normed.template load_token<WORDS>(out, token, k);
  }
};

// One threadgroup: outputs [group * HALF, ...) of every token, and a share of the normed tokens.
//   x, norm, eps, factors, normed: as normed_linear_map   wide: normed in float32
//   matrix: [2 * OUTPUTS, WIDTH], the gates first   y: [tokens, OUTPUTS]
template <
    typename T, bool MATRIX, int TOKENS, int OCTETS, int SIMDGROUPS, int DEPTH, bool AHEAD,
    int OUTPUTS, int WIDTH, typename Weights, typename Eps>
void normed_gated_map(
    const device T* x, const device T* norm, Eps eps, Weights matrix, device T* y,
    device T* normed, device float* wide, uint tokens, threadgroup float* factors,
    threadgroup float* partials, uint group, uint groups, uint simdgroup, uint lane) {
  const int ROWS = 8 * OCTETS, HALF = ROWS / 2;
  const uint first_row = group * HALF;
  typedef NormedOperands<T, SIMDGROUPS, WIDTH, Eps> Normed;
  const Normed tokens_normed = {
      {x, tokens, first_row, WIDTH}, norm, eps, partials, factors, WIDTH};
  const GatedOperands<T, SIMDGROUPS, WIDTH, HALF, OUTPUTS, Eps> operands = {tokens_normed, WIDTH};
  Tile<MATRIX, T, Weights, OCTETS, TOKENS> tile;
  stream_rows<OCTETS, SIMDGROUPS, DEPTH, AHEAD>(tile, matrix, operands, simdgroup, lane);
  store_partials<TOKENS, ROWS>(tile, partials, simdgroup, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (uint i = simdgroup * 32 + lane; i < tokens * HALF; i += SIMDGROUPS * 32) {
    const uint token = i / HALF, row = i % HALF;
    const float gate = add_partials<SIMDGROUPS, TOKENS, ROWS>(partials, token, row);
    const float value = add_partials<SIMDGROUPS, TOKENS, ROWS>(partials, token, row + HALF);
    y[token * OUTPUTS + first_row + row] = T(activate(gate, true) * value);
  }
  const uint first = (group * SIMDGROUPS + simdgroup) * 32 + lane;
  for (uint i = first; i < tokens * Normed::PIECES; i += groups * SIMDGROUPS * 32) {
    uint words[4];
    tokens_normed.template load_token<4>(
        words, i / Normed::PIECES, i % Normed::PIECES * Normed::PIECE);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      ((device uint*)normed)[4 * i + j] = words[j];
    }
#pragma unroll
    for (int j = 0; j < Normed::PIECE; ++j) {
      wide[i * Normed::PIECE + j] = element(words, j, T(0));
    }
  }
}
