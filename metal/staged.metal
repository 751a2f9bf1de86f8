// Products for long chunks: weight rows in registers, tokens in threadgroup memory.
//
// Each simdgroup streams its own 8 * OCTETS weight rows, as in tile.metal, so that a threadgroup
// reads every weight once. The tokens that all of its simdgroups multiply them by wait in
// threadgroup memory, a window of weights wide or several, in STAGES stages: one is multiplied while the
// others are on their way.
#pragma once
#include <metal_stdlib>
#include "simdgroup.metal"
#include "tile.metal"
using namespace metal;

template <int STEP>
inline uint round_up(uint count) {
  return (count + STEP - 1) / STEP * STEP;
}

// A stage: [TOKENS, WIDTH], in rows that keep the lanes of a load out of each other's banks.
template <typename T, int TOKENS, int WIDTH>
struct Stage {
  enum { PIECE = 16 / sizeof(T), PIECES = WIDTH / PIECE, STRIDE = PIECES + 1 };  // of 16 bytes
  threadgroup uint4* data;

  // The stage of a number; `memory` has room for STRIDE * TOKENS pieces each.
  static Stage at(threadgroup uint4* memory, uint stage) {
    return {memory + stage * STRIDE * TOKENS};
  }

  // Starts to fill row `row` from piece `piece` of a token's row, or with zeros.
  void fill(uint row, uint piece, const device uint4* source, bool real) const thread {
    copy_piece(data + row * STRIDE + piece, source, real);
  }

  // What tile.metal asks of a product's operands.
  template <int WORDS>
  void load_token(thread uint* out, uint token, uint k) const thread {
    const threadgroup uint4* source = data + token * STRIDE + k / PIECE;
#pragma unroll
    for (int i = 0; i < WORDS / 4; ++i) {
      const uint4 piece = source[i];
      out[4 * i] = piece.x;
      out[4 * i + 1] = piece.y;
      out[4 * i + 2] = piece.z;
      out[4 * i + 3] = piece.w;
    }
  }
};

// The weight rows of a simdgroup in a window: from `row` on, by eights.
template <int OCTETS, typename Weights>
inline void load_window(
    thread typename Weights::Span* spans, Weights weights, ulong row, uint k, uint columns) {
  const Weights rows = weights.from_row(row, columns);
#pragma unroll
  for (int i = 0; i < OCTETS; ++i) {
    if (k < columns) {
      rows.load(spans[i], 8 * i, k, columns);
    } else {
      Weights::clear(spans[i]);
    }
  }
}

// Adds the window at `start` of a stage to the sums of the first `tokens` tokens, rounded up to
// 8 * BATCH: whoever knows
// that these come together can load the next eight while eight are multiplied.
template <int BATCH, typename TileType, typename Span, typename StageType>
inline void add_window(
    thread TileType& tile, const thread Span* spans, StageType stage, uint start, uint tokens,
    uint lane) {
  const uint row = lane_row(lane), quarter = lane_quarter(lane);
#pragma unroll
  for (int part = 0; part < TileType::parts; ++part) {
    const typename TileType::Rows rows(spans, part);
#pragma unroll
    for (int first = 0; first < TileType::columns; first += BATCH) {
      if (8 * uint(first) < tokens) {
        typename TileType::Column columns[BATCH];
#pragma unroll
        for (int n = 0; n < BATCH; ++n) {
          TileType::load(columns[n], first + n, part, stage, start, row, quarter);
        }
#pragma unroll
        for (int n = 0; n < BATCH; ++n) {
          tile.add(first + n, rows, columns[n]);
        }
      }
    }
  }
}
