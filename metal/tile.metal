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
  // A lane unpacks its spans in parts, so that it need not hold all of them as floats.
  enum { parts = Weights::span > 16 ? Weights::span / 16 : 1, steps = Weights::span / parts };
  enum { columns = TOKENS };
  struct Rows {
    float values[OCTETS][steps];
    Rows(const thread typename Weights::Span* spans, int part) thread {
#pragma unroll
      for (int i = 0; i < OCTETS; ++i) {
#pragma unroll
        for (int j = 0; j < steps; ++j) {
          values[i][j] = spans[i].value(part * steps + j);
        }
      }
    }
  };
  struct Column {
    uint x[steps * sizeof(T) / 4];
  };
  float sums[OCTETS][TOKENS];

  void clear() thread {
#pragma unroll
    for (int i = 0; i < OCTETS; ++i) {
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        sums[i][t] = 0.0f;
      }
    }
  }

  template <typename Operands>
  static void load(
      thread Column& out, int t, int part, Operands operands, uint start, uint, uint quarter) {
    const uint k = start + quarter * Weights::span + part * steps;
    operands.template load_token<steps * sizeof(T) / 4>(out.x, t, k);
  }

  void add(int t, const thread Rows& rows, const thread Column& column) thread {
#pragma unroll
    for (int i = 0; i < OCTETS; ++i) {
#pragma unroll
      for (int j = 0; j < steps; ++j) {
        sums[i][t] += rows.values[i][j] * element(column.x, j, T(0));
      }
    }
  }

  // Writes the sums to out[token * stride + row].
  void store(threadgroup float* out, uint stride, uint row, uint quarter) thread {
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

// Many tokens: products of small matrices, with weights as the rows and eight tokens as a column.
template <typename T, typename Weights, int OCTETS, int TOKENS>
struct Tile<true, T, Weights, OCTETS, TOKENS> {
  typedef MatrixRows<T, Weights, OCTETS> Rows;
  enum { parts = Rows::PARTS, columns = TOKENS / 8, half_words = Rows::STEPS * sizeof(T) / 4 };
  // Each lane brings two half spans of the eight tokens; which, is the matrix unit's choice.
  struct Column {
    uint x[2][half_words];
  };
  float sums[OCTETS][columns][2];  // rows 8 * i + row, tokens 8 * n + 2 * quarter + {0, 1}

  void clear() thread {
#pragma unroll
    for (int i = 0; i < OCTETS; ++i) {
#pragma unroll
      for (int n = 0; n < columns; ++n) {
        sums[i][n][0] = sums[i][n][1] = 0.0f;
      }
    }
  }

  template <typename Operands>
  static void load(
      thread Column& out, int n, int part, Operands operands, uint start, uint row, uint quarter) {
    const TokenHalves halves(row, quarter, Weights::span, Weights::span / 2);
    const uint k = start + part * Rows::STEPS;
    operands.template load_token<half_words>(out.x[0], 8 * n + halves.token0, k + halves.k0);
    operands.template load_token<half_words>(out.x[1], 8 * n + halves.token1, k + halves.k1);
  }

  void add(int n, const thread Rows& rows, const thread Column& column) thread {
#pragma unroll
    for (int i = 0; i < OCTETS; i += ROW_STEP) {
      rows.multiply(i, column.x[0], column.x[1], sums[i][n], sums[i + ROW_STEP - 1][n]);
    }
  }

  void store(threadgroup float* out, uint stride, uint row, uint quarter) thread {
#pragma unroll
    for (int i = 0; i < OCTETS; ++i) {
#pragma unroll
      for (int n = 0; n < columns; ++n) {
        threadgroup float* column = out + (8 * n + 2 * quarter) * stride + 8 * i + row;
        column[0] = sums[i][n][0];
        column[stride] = sums[i][n][1];
      }
    }
  }
};

// Tokens are loaded from where they lie. StagedTokens (staged_tokens.metal) is the other way.
struct DeviceTokens {
  template <typename Operands>
  void send(Operands, uint, uint, uint) const thread {}
  template <int LEFT, typename Operands>
  Operands arrived(Operands operands, uint, uint) const thread {
    return operands;
  }
  void leave() const thread {}
};

// Streams the weight rows of a tile: the windows go round the simdgroups of the threadgroup, and
// each simdgroup keeps DEPTH windows of weights on their way while it works, with their tokens if
// AHEAD. Otherwise those are loaded when their turn comes, which takes fewer registers. What tokens
// need before they can be loaded is prepared while the first weights are on their way.
template <
    int OCTETS, int SIMDGROUPS, int DEPTH, bool AHEAD, typename TileType, typename Weights,
    typename Operands, typename Source = DeviceTokens>
inline void stream_rows(
    thread TileType& tile, Weights weights, Operands operands, uint simdgroup, uint lane,
    Source source = Source()) {
  const uint window = 4 * Weights::span, step = SIMDGROUPS * window;
  const uint row = lane_row(lane), quarter = lane_quarter(lane);
  typename Weights::Span spans[DEPTH][OCTETS];
  const int parts = TileType::parts, ahead = AHEAD ? parts * TileType::columns : 0;
  typename TileType::Column columns[AHEAD ? DEPTH : 1][AHEAD ? ahead : 1];
  tile.clear();
#pragma unroll
  for (int i = 0; i < DEPTH; ++i) {
    const uint k = simdgroup * window + i * step + quarter * Weights::span;
    operands.template load_rows<OCTETS>(spans[i], weights, row, k);
    source.send(operands, i * SIMDGROUPS + simdgroup, simdgroup * window + i * step, lane);
  }
  operands.prepare(simdgroup, lane);
#pragma unroll
  for (int i = 0; i < DEPTH; ++i) {
    const uint start = simdgroup * window + i * step;
#pragma unroll
    for (int n = 0; n < ahead; ++n) {
      TileType::load(columns[i][n], n / parts, n % parts, operands, start, row, quarter);
    }
  }
  for (uint first = simdgroup * window; first < operands.length; first += DEPTH * step) {
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
      const uint start = first + i * step, next = start + DEPTH * step;
      if (start < operands.length) {
        const uint slot = i * SIMDGROUPS + simdgroup;
        const auto tokens = source.template arrived<DEPTH - 1>(operands, slot, start);
#pragma unroll
        for (int part = 0; part < parts; ++part) {
          const typename TileType::Rows rows(spans[i], part);
#pragma unroll
          for (int n = 0; n < TileType::columns; ++n) {
            thread typename TileType::Column& column =
                columns[AHEAD ? i : 0][AHEAD ? n * parts + part : 0];
            if (!AHEAD) {
              TileType::load(column, n, part, tokens, start, row, quarter);
            }
            tile.add(n, rows, column);
          }
        }
        source.leave();
        operands.template load_rows<OCTETS>(spans[i], weights, row, next + quarter * Weights::span);
        source.send(operands, slot, next, lane);
#pragma unroll
        for (int n = 0; n < ahead; ++n) {
          TileType::load(columns[i][n], n / parts, n % parts, operands, next, row, quarter);
        }
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

template <int TOKENS, int ROWS, typename TileType>
inline void store_partials(
    thread TileType& tile, threadgroup float* partials, uint simdgroup, uint lane) {
  const int stride = Partials<ROWS>::stride;
  tile.store(partials + simdgroup * TOKENS * stride, stride, lane_row(lane), lane_quarter(lane));
}

template <int SIMDGROUPS, int TOKENS, int ROWS>
inline float add_partials(const threadgroup float* partials, uint token, uint row) {
  float sum = 0.0f;
#pragma unroll
  for (int s = 0; s < SIMDGROUPS; ++s) {
    sum += partials[(s * TOKENS + token) * Partials<ROWS>::stride + row];
  }
  return sum;
}
