// Products for long chunks: weight rows in registers, tokens in threadgroup memory.
//
// Each simdgroup streams its own 8 * OCTETS weight rows, as in tile.metal, so that a threadgroup
// reads every weight once. The tokens that all of its simdgroups multiply them by wait in
// threadgroup memory, one window of weights wide or several, in STAGES stages: one is multiplied
// while the others are on their way.
#pragma once
#include <metal_stdlib>
#include "simdgroup.metal"
#include "stage.metal"
#include "tile.metal"
using namespace metal;

template <int STEP>
inline uint round_up(uint count) {
  return (count + STEP - 1) / STEP * STEP;
}

// Plain weights of which the four lanes of a row take pieces of 16 bytes in turn: a load then asks
// for whole sectors of memory, which are 32 bytes wide on CUDA.
template <typename T>
struct TurnedWeights {
  enum { span = 32 / sizeof(T), interleaved = false };
  typedef typename PlainWeights<T>::Span Span;
  const device T* data;

  TurnedWeights from_row(ulong row, uint columns) const thread { return {data + row * columns}; }
  void load(thread Span& out, uint row, uint column, uint columns) const thread {
    const device T* const source = data + (row * columns + column);
    stream_words<4>(out.words, (const device uint*)source);
    if (columns % (4 * span) == 0 || column + 2 * span < columns) {
      stream_words<4>(out.words + 4, (const device uint*)(source + 2 * span));
    } else {
      out.words[4] = out.words[5] = out.words[6] = out.words[7] = 0;
    }
  }
  static void clear(thread Span& out) { PlainWeights<T>::clear(out); }
};

// How far the spans of neighbouring lanes lie apart, and the halves of a span.
template <typename Weights>
struct Spans {
  enum { reach = Weights::span, apart = Weights::span / 2 };
};
template <typename T>
struct Spans<TurnedWeights<T>> {
  enum { reach = TurnedWeights<T>::span / 2, apart = 2 * TurnedWeights<T>::span };
};

// Weights as these products stream them.
template <typename T>
inline TurnedWeights<T> streamed(PlainWeights<T> weights) {
  return {weights.data};
}
template <typename T, int BITS, int GROUP>
inline AffineWeights<T, BITS, GROUP> streamed(AffineWeights<T, BITS, GROUP> weights) {
  return weights;
}

// How THREADS threads fill a stage: each takes a piece of every TURN-th row.
template <typename StageType, int TOKENS, int THREADS>
struct Filler {
  enum { TURN = THREADS / StageType::PIECES, TURNS = (TOKENS + TURN - 1) / TURN };
  uint row, piece, place;

  Filler(uint thread_index) thread
      : row(thread_index / StageType::PIECES),
        piece(thread_index % StageType::PIECES),
        place(StageType::place(row, piece)) {}

  // Starts to fill its piece of row `row + turn * TURN`, or clears it.
  void fill(StageType stage, int turn, const device uint4* source, bool real) const thread {
    if (TURNS * TURN == TOKENS || row + turn * TURN < uint(TOKENS)) {
      const uint at = TURN % 8 == 0 ? place + turn * TURN * StageType::PIECES
                                    : StageType::place(row + turn * TURN, piece);
      copy_piece(stage.data + at, source, real);
    }
  }
};

// 8 * OCTETS columns (weight rows) of TOKENS tokens, held by one simdgroup; SumLanes says which of
// them a lane has.
template <typename T, typename Weights, int OCTETS, int TOKENS>
struct StagedTile {
  typedef MatrixRows<T, Weights, OCTETS> Rows;
  typedef SumLanes<OCTETS> Lanes;
  enum {
    COLUMNS = Lanes::COLUMNS,
    SLOTS = TOKENS / 8 * Lanes::SLOTS,
    PIECES = Rows::STEPS * sizeof(T) / 16
  };
  // Each lane brings two half spans of eight tokens; which, is the matrix unit's choice.
  struct Eight {
    uint x[2][4 * PIECES];

    void set(int half_span, int i, uint4 piece) thread {
      x[half_span][4 * i] = piece.x;
      x[half_span][4 * i + 1] = piece.y;
      x[half_span][4 * i + 2] = piece.z;
      x[half_span][4 * i + 3] = piece.w;
    }
  };
  float sums[SLOTS][COLUMNS];

  void clear() thread {
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        sums[i][j] = 0.0f;
      }
    }
  }

  // Adds window `window` of a stage, for the first `count` tokens, rounded up to 8 * BATCH: without
  // branches between them, the next tokens are loaded while some are multiplied.
  template <int BATCH, typename StageType>
  void add_window(
      const thread typename Weights::Span* spans, StageType stage, int window, uint count,
      uint lane) thread {
    const TokenHalves halves(
        lane_row(lane), lane_quarter(lane), Spans<Weights>::reach, Spans<Weights>::apart);
    const uint place0 = StageType::place(halves.token0, halves.k0 / StageType::PIECE);
    const uint place1 = StageType::place(halves.token1, halves.k1 / StageType::PIECE);
#pragma unroll
    for (int part = 0; part < Rows::PARTS; ++part) {
      const Rows rows(spans, part);
#pragma unroll
      for (int first = 0; first < TOKENS / 8; first += BATCH) {
        if (first == 0 || 8 * uint(first) < count) {
#pragma unroll
          for (int n = first; n < first + BATCH; n += 2) {
            const threadgroup uint4* const data = stage.data +
                (8 * n * StageType::PIECES + window * StageType::WINDOW_PIECES);
            Eight eights[2];
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
              const uint piece = part * PIECES + i;
              eights[0].set(0, i, data[place0 ^ piece]);
              eights[0].set(1, i, data[place1 ^ piece]);
              eights[1].set(0, i, data[(place0 ^ piece) + 8 * StageType::PIECES]);
              eights[1].set(1, i, data[(place1 ^ piece) + 8 * StageType::PIECES]);
            }
            multiply_tokens(rows, eights, sums + n * Lanes::SLOTS);
          }
        }
      }
    }
  }
};

// A simdgroup's weight rows in the window at `start`, of which `row` is a lane's first.
template <int OCTETS, int WIDTH, typename Weights>
inline void load_window(
    thread typename Weights::Span* spans, Weights weights, ulong row, uint start, uint columns,
    uint lane) {
  const Weights rows = weights.from_row(row, columns);
  const uint k = start + lane_quarter(lane) * Spans<Weights>::reach;
#pragma unroll
  for (int i = 0; i < OCTETS; ++i) {
    if (columns % WIDTH == 0 || k < columns) {
      rows.load(spans[i], SumLanes<OCTETS>::ROW_STRIDE * i, k, columns);
    } else {
      Weights::clear(spans[i]);
    }
  }
}

// Word i of numbers in T.
template <typename T>
inline uint word_of(const thread float* values, int i, T) {
  return pack_pair(values[2 * i], values[2 * i + 1], T(0));
}
inline uint word_of(const thread float* values, int i, float) {
  return as_type<uint>(values[i]);
}

// Writes COUNT neighbouring numbers in T, the first at a multiple of all their bytes.
template <int COUNT, typename T>
inline void store_columns(device T* out, const thread float* values) {
  if (COUNT * sizeof(T) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < int(COUNT * sizeof(T) / 16); ++i) {
      uint4 piece;
      piece.x = word_of(values, 4 * i, T(0));
      piece.y = word_of(values, 4 * i + 1, T(0));
      piece.z = word_of(values, 4 * i + 2, T(0));
      piece.w = word_of(values, 4 * i + 3, T(0));
      ((device uint4*)out)[i] = piece;
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      out[i] = T(values[i]);
    }
  }
}
