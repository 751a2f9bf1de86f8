// Up projection of a long chunk: each expert's rows by the tokens that use it.
#include <metal_stdlib>
#include "staged.metal"
#include "up.metal"
using namespace metal;

// starts[e] = tiles of the experts before e, and their number at the end, in threadgroup memory.
template <int EXPERTS, int TOKENS, typename Counts>
inline void list_tiles(Counts counts, threadgroup uint* starts, uint simdgroup, uint lane) {
  if (simdgroup == 0) {
    uint before = 0;
#pragma unroll
    for (int i = 0; i < (EXPERTS + 31) / 32; ++i) {
      const uint expert = i * 32 + lane;
      const uint tiles = expert < EXPERTS ? (counts[expert] + TOKENS - 1) / TOKENS : 0;
      const uint until = simd_prefix_inclusive_sum(tiles);
      if (expert < EXPERTS) {
        starts[expert + 1] = before + until;
      }
      before += simd_sum(tiles);
    }
    if (lane == 0) {
      starts[0] = 0;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// The threadgroups go round the tiles of 8 * OCTETS * SIMDGROUPS rows of an expert by TOKENS of its
// tokens; how many there are, lies on the device.
//   x: [tokens, HIDDEN]   scores: [tokens, EXPERTS]   up: [EXPERTS, EXPERT_SIZE, HIDDEN]
//   counts, lists: as place_tokens leaves them
//   h: [EXPERTS, tokens, EXPERT_SIZE], row i of an expert for the i-th token of its list; rows
//      behind them stay unwritten
//   memory: [STAGES * TOKENS * Stage::STRIDE]   starts: [EXPERTS + 1]   listed, weights: [TOKENS]
template <
    typename T, int TOKENS, int OCTETS, int SIMDGROUPS, int STAGES, int BATCH, int EXPERTS,
    int HIDDEN, int EXPERT_SIZE, bool SILU, typename Weights, typename Scores, typename Counts>
void grouped_up_projection(
    const device T* x, Scores scores, Counts counts, const device uint* lists, Weights up,
    device T* h, uint tokens, threadgroup uint4* memory, threadgroup uint* starts,
    threadgroup uint* listed, threadgroup float* weights, uint group, uint groups, uint simdgroup,
    uint lane) {
  const int WINDOW = 4 * Weights::span, STEPS = (HIDDEN + WINDOW - 1) / WINDOW;
  const int ROWS = 8 * OCTETS * SIMDGROUPS, TILES = (EXPERT_SIZE + ROWS - 1) / ROWS;
  const int THREADS = 32 * SIMDGROUPS;
  typedef Stage<T, TOKENS, WINDOW> StageType;
  typedef Tile<true, T, Weights, OCTETS, TOKENS> TileType;
  // pieces of a stage that a thread copies
  const int PIECES = StageType::PIECES, EACH = (TOKENS * PIECES + THREADS - 1) / THREADS;
  const uint thread_index = simdgroup * 32 + lane, quarter = lane_quarter(lane);
  list_tiles<EXPERTS, TOKENS>(counts, starts, simdgroup, lane);

  uint expert = 0;
  for (uint i = group; i < starts[EXPERTS] * TILES; i += groups) {
    while (i / TILES >= starts[expert + 1]) {
      ++expert;
    }
    // An expert's tiles are alike, so that threadgroups have about as much to do.
    const uint total = counts[expert], tiles = starts[expert + 1] - starts[expert];
    const uint each = round_up<8 * BATCH>((total + tiles - 1) / tiles);
    const uint first = (i / TILES - starts[expert]) * each, count = min(total - first, each);
    const uint filled = round_up<8 * BATCH>(count);
    const ulong place = ulong(expert) * tokens + first;
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the last tile has been multiplied
    for (uint j = thread_index; j < TOKENS; j += THREADS) {
      const uint token = lists[place + min(j, count - 1)];
      listed[j] = token;
      weights[j] = float(scores[ulong(token) * EXPERTS + expert]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    uint sources[EACH];  // in pieces
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      const uint to = min((j * THREADS + thread_index) / PIECES, uint(TOKENS - 1));
      sources[j] = listed[to] * (HIDDEN / StageType::PIECE);
    }

    const uint row = i % TILES * ROWS + simdgroup * 8 * OCTETS + lane_row(lane);
    const bool has_rows = i % TILES * ROWS + simdgroup * 8 * OCTETS < uint(EXPERT_SIZE);
    const ulong weight_row = ulong(expert) * EXPERT_SIZE + row;
    typename Weights::Span spans[OCTETS], next[OCTETS];
    TileType tile;
    tile.clear();
    if (has_rows) {
      load_window<OCTETS>(next, up, weight_row, quarter * Weights::span, HIDDEN);
    }
#pragma unroll 1
    for (int step = 1 - STAGES; step < STEPS; ++step) {
      if (step >= 0) {
        await_copies<STAGES - 2>();
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      const int ahead = step + STAGES - 1;
      if (ahead < STEPS) {
        const StageType stage = StageType::at(memory, ahead % STAGES);
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
          const uint at = j * THREADS + thread_index, to = at / PIECES, piece = at % PIECES;
          const uint k = ahead * PIECES + piece;
          if (to < filled) {
            const bool real = k < uint(HIDDEN / StageType::PIECE);
            stage.fill(to, piece, (const device uint4*)x + (sources[j] + (real ? k : 0)), real);
          }
        }
      }
      end_copies();
      if (step >= 0 && has_rows) {
#pragma unroll
        for (int octet = 0; octet < OCTETS; ++octet) {
          spans[octet] = next[octet];
        }
        if (step + 1 < STEPS) {
          const uint k = (step + 1) * WINDOW + quarter * Weights::span;
          load_window<OCTETS>(next, up, weight_row, k, HIDDEN);
        }
        add_window<BATCH>(tile, spans, StageType::at(memory, step % STAGES), 0, count, lane);
      }
    }

    if (has_rows) {
#pragma unroll
      for (int n = 0; n < TOKENS / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint token = 8 * n + 2 * quarter + j;
          if (token < count) {
            const float score = weights[token];
            device T* const out = h + (place + token) * EXPERT_SIZE + row;
#pragma unroll
            for (int octet = 0; octet < OCTETS; ++octet) {
              out[8 * octet] = T(activate(tile.sums[octet][n][j], SILU) * score);
            }
          }
        }
      }
    }
  }
}
