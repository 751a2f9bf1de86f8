// A tile of a product: 8 * OCTETS weight rows by TOKENS tokens, held by one simdgroup.
//
// Lane (row, quarter) streams rows row, row + 8, ... of the tile: `span` neighbouring weights, so
// the four lanes of a row take one run of 4 * span (a window) and every byte is loaded once, for
// all tokens. A dot product does not care in which order its terms come, so the tokens follow
// whatever order that makes.
#pragma once
#include <metal_stdlib>
#include "simdgroup.metal"
#include "weights.metal"
using namespace metal;

template <bool MATRIX, typename T, typename Weights, int OCTETS, int TOKENS>
struct Tile;

// Few tokens: each lane multiplies its spans itself, then the four lanes of a row add up.
template <typename T, typename Weights, int OCTETS, int TOKENS>
struct Tile<false, T, Weights, OCTETS, TOKENS> {
  enum { span = Weights::span, words = span * sizeof(T) / 4 };
  float sums[OCTETS][TOKENS];

  void clear() {
    for (int i = 0; i < OCTETS; ++i) {
      for (int t = 0; t < TOKENS; ++t) {
        sums[i][t] = 0.0f;
      }
    }
  }

  // Adds the window that begins at `start`; `weights` are this lane's spans of it.
  template <typename Operands>
  void add(
      const thread typename Weights::Span* weights, Operands operands, uint start, uint,
      uint quarter) {
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      uint x[words];
      operands.template load_token<words>(x, t, start + quarter * span);
#pragma unroll
      for (int i = 0; i < OCTETS; ++i) {
#pragma unroll
        for (int j = 0; j < span; ++j) {
          sums[i][t] += weights[i].value(j) * element(x, j, T(0));
        }
      }
    }
  }

  // Writes the sums to out[token * stride + row].
  void store(threadgroup float* out, uint stride, uint row, uint quarter) {
#pragma unroll
    for (int i = 0; i < OCTETS; ++i) {
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        const float sum = sum_quarters(sums[i][t]);
        if (quarter == uint(t) % 4) {
          out[t * stride + 8 * i + row] = sum;
        }
      }
    }
  }
};

// Many tokens: products of small matrices, with weights as the rows and tokens as the columns.
template <typename T, typename Weights, int OCTETS, int TOKENS>
struct Tile<true, T, Weights, OCTETS, TOKENS> {
  enum { span = Weights::span, half_words = span * sizeof(T) / 8 };
  float sums[OCTETS][TOKENS / 8][2];  // rows 8 * i + row, tokens 8 * n + 2 * quarter + {0, 1}

  void clear() {
    for (int i = 0; i < OCTETS; ++i) {
      for (int n = 0; n < TOKENS / 8; ++n) {
        sums[i][n][0] = sums[i][n][1] = 0.0f;
      }
    }
  }

  template <typename Operands>
  void add(
      const thread typename Weights::Span* weights, Operands operands, uint start, uint row,
      uint quarter) {
    const MatrixRows<T, span, OCTETS> rows(weights);
    // Each lane brings half a span of two columns; which ones is the matrix unit's choice.
    const TokenHalves halves(row, quarter, span);
#pragma unroll
    for (int n = 0; n < TOKENS / 8; ++n) {
      uint x[2][half_words];
      operands.template load_token<half_words>(x[0], 8 * n + halves.token0, start + halves.k0);
      operands.template load_token<half_words>(x[1], 8 * n + halves.token1, start + halves.k1);
#pragma unroll
      for (int i = 0; i < OCTETS; i += ROW_STEP) {
        rows.multiply(i, x[0], x[1], sums[i][n], sums[i + ROW_STEP - 1][n]);
      }
    }
  }

  void store(threadgroup float* out, uint stride, uint row, uint quarter) {
#pragma unroll
    for (int i = 0; i < OCTETS; ++i) {
#pragma unroll
      for (int n = 0; n < TOKENS / 8; ++n) {
        threadgroup float* column = out + (8 * n + 2 * quarter) * stride + 8 * i + row;
        column[0] = sums[i][n][0];
        column[stride] = sums[i][n][1];
      }
    }
  }
};

// Streams the weight rows of a tile: the windows go round the simdgroups of the threadgroup, and
// each simdgroup keeps DEPTH windows on their way while it works.
template <int OCTETS, int SIMDGROUPS, int DEPTH, typename TileType, typename Weights, typename Operands>
inline void stream_rows(
    thread TileType& tile, Weights weights, Operands operands, uint simdgroup, uint lane) {
  const uint window = 4 * Weights::span, step = SIMDGROUPS * window;
  const uint row = lane_row(lane), quarter = lane_quarter(lane);
  typename Weights::Span spans[DEPTH][OCTETS];
  tile.clear();
#pragma unroll
  for (int i = 0; i < DEPTH; ++i) {
    const uint start = (simdgroup + i * SIMDGROUPS) * window;
    operands.template load_rows<OCTETS>(spans[i], weights, row, start + quarter * Weights::span);
  }
  for (uint first = simdgroup * window; first < operands.length; first += DEPTH * step) {
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
      const uint start = first + i * step;
      if (start < operands.length) {
        tile.add(spans[i], operands, start, row, quarter);
        operands.template load_rows<OCTETS>(
            spans[i], weights, row, start + DEPTH * step + quarter * Weights::span);
      }
    }
  }
}

// The simdgroups' parts of one sum, left in threadgroup memory as [SIMDGROUPS, TOKENS, stride].
// The stride keeps the lanes of a store out of each other's banks.
template <int ROWS>
struct Partials {
  enum { stride = ROWS + 4 };
};

template <int SIMDGROUPS, int TOKENS, int ROWS>
inline float add_partials(const threadgroup float* partials, uint token, uint row) {
  float sum = 0.0f;
#pragma unroll
  for (int s = 0; s < SIMDGROUPS; ++s) {
    sum += partials[(s * TOKENS + token) * Partials<ROWS>::stride + row];
  }
  return sum;
}
