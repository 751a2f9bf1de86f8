// A linear map of normed tokens, y = RMSNorm(x) W^T, in the launch of the product.
#include <metal_stdlib>
#include "up.metal"
using namespace metal;

// Two elements of a token, or one of float32, rounded where MLX's own norm rounds: before the
// weight and behind it.
inline uint normed_word(uint x, uint weight, float factor, float) {
  return as_type<uint>(as_type<float>(x) * factor * as_type<float>(weight));
}
template <typename T>
inline uint normed_word(uint x, uint weight, float factor, T zero) {
  const uint scaled =
      pack_pair(element(&x, 0, zero) * factor, element(&x, 1, zero) * factor, zero);
  return pack_pair(
      element(&scaled, 0, zero) * element(&weight, 0, zero),
      element(&scaled, 1, zero) * element(&weight, 1, zero), zero);
}

// What the tile multiplies: rows of the matrix by tokens that are normed where they are loaded.
template <typename T, int SIMDGROUPS, int WIDTH, typename Eps>
struct NormedOperands {
  enum { PIECE = 16 / sizeof(T), PIECES = WIDTH / PIECE };  // elements of 16 bytes
  UpOperands<T, WIDTH> plain;
  const device T* norm;        // [WIDTH]
  Eps eps;                     // [4], all the same
  threadgroup float* sums;     // scratch: of a share of a token's squares
  threadgroup float* factors;  // [tokens], what the norm multiplies a token by
  uint length;                 // WIDTH

  // Several simdgroups share a token where there are few.
  void prepare(uint simdgroup, uint lane) const thread {
    const uint tokens = plain.tokens;
    const uint shares = tokens < uint(SIMDGROUPS) ? SIMDGROUPS / tokens : 1;
    for (uint i = simdgroup; i < tokens * shares; i += SIMDGROUPS) {
      float squares = 0.0f;
      for (uint piece = i % shares * 32 + lane; piece < uint(PIECES); piece += shares * 32) {
        uint words[4];
        plain.template load_token<4>(words, i / shares, piece * PIECE);
#pragma unroll
        for (int j = 0; j < PIECE; ++j) {
          const float value = element(words, j, T(0));
          squares += value * value;
        }
      }
      squares = simd_sum(squares);
      if (lane == 0) {
        sums[i] = squares;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint token = simdgroup * 32 + lane; token < tokens; token += SIMDGROUPS * 32) {
      float squares = 0.0f;
      for (uint share = 0; share < shares; ++share) {
        squares += sums[token * shares + share];
      }
      factors[token] = rsqrt(squares / WIDTH + eps[0]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  template <int OCTETS, typename Weights>
  void load_rows(
      thread typename Weights::Span* out, Weights matrix, uint row, uint k) const thread {
    plain.template load_rows<OCTETS>(out, matrix, row, k);
  }

  template <int WORDS>
  void load_token(thread uint* out, uint token, uint k) const thread {
    plain.template load_token<WORDS>(out, token, k);
    if (k < uint(WIDTH)) {
      uint weight[WORDS];
      copy_words<WORDS>(weight, (const device uint*)(norm + k));
      const float factor = factors[min(token, plain.tokens - 1)];
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
        out[i] = normed_word(out[i], weight[i], factor, T(0));
      }
    }
  }
};

// One threadgroup: outputs [group * 8 * OCTETS, ...) of every token, and a share of the normed
// tokens. Each norms all tokens for itself, while its first weights are on their way.
//   x, normed: [tokens, WIDTH]   norm: [WIDTH]   eps: [4], all the same
//   matrix: [OUTPUTS, WIDTH]   y: [tokens, OUTPUTS]   factors: [TOKENS], scratch
template <
    typename T, bool MATRIX, int TOKENS, int OCTETS, int SIMDGROUPS, int DEPTH, bool AHEAD,
    int OUTPUTS, int WIDTH, typename Weights, typename Eps>
void normed_linear_map(
    const device T* x, const device T* norm, Eps eps, Weights matrix, device T* y,
    device T* normed, uint tokens, threadgroup float* factors, threadgroup float* partials,
    uint group, uint groups, uint simdgroup, uint lane) {
  const int ROWS = 8 * OCTETS;
  const uint first_row = group * ROWS;
  typedef NormedOperands<T, SIMDGROUPS, WIDTH, Eps> Operands;
  // the partials come later
  const Operands operands = {{x, tokens, first_row, WIDTH}, norm, eps, partials, factors, WIDTH};
  Tile<MATRIX, T, Weights, OCTETS, TOKENS> tile;
  stream_rows<OCTETS, SIMDGROUPS, DEPTH, AHEAD>(tile, matrix, operands, simdgroup, lane);
  store_partials<TOKENS, ROWS>(tile, partials, simdgroup, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (uint i = simdgroup * 32 + lane; i < tokens * ROWS; i += SIMDGROUPS * 32) {
    const uint token = i / ROWS, row = i % ROWS;
    const float sum = add_partials<SIMDGROUPS, TOKENS, ROWS>(partials, token, row);
    y[token * OUTPUTS + first_row + row] = T(sum);
  }
  const uint pieces = Operands::PIECES, first = (group * SIMDGROUPS + simdgroup) * 32 + lane;
  for (uint i = first; i < tokens * pieces; i += groups * SIMDGROUPS * 32) {
    uint words[4];
    operands.template load_token<4>(words, i / pieces, i % pieces * Operands::PIECE);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      ((device uint*)normed)[4 * i + j] = words[j];
    }
  }
}
