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

// The expert that a tile belongs to: how many experts' tiles end before it.
template <int EXPERTS>
inline uint tile_expert(const threadgroup uint* starts, uint tile, uint lane) {
  uint expert = 0;
#pragma unroll
  for (int i = 0; i < (EXPERTS + 31) / 32; ++i) {
    const uint other = i * 32 + lane;
    const bool before = other < EXPERTS && starts[min(other, uint(EXPERTS - 1)) + 1] <= tile;
    expert += popcount(uint(simd_vote::vote_t(simd_ballot(before))));
  }
  return expert;
}

// Starts to fill the stage of a step with the rows of x that are listed, by pieces.
template <
    typename StageType, int TOKENS, int STAGES, int HIDDEN, typename T, typename FillerType>
inline void fill_listed(
    const device T* x, threadgroup uint4* memory, const threadgroup uint* listed, uint count,
    int step, FillerType filler) {
  const int WIDTH = StageType::PIECES * StageType::PIECE;
  if (step * WIDTH < HIDDEN) {
    const StageType stage = StageType::at(memory, step % STAGES);
    const uint k = step * StageType::PIECES + filler.piece;
    const bool inside = HIDDEN % WIDTH == 0 || k < uint(HIDDEN / StageType::PIECE);
    uint sources[FillerType::TURNS];
#pragma unroll
    for (int i = 0; i < FillerType::TURNS; ++i) {
      sources[i] = listed[min(filler.row + i * FillerType::TURN, uint(TOKENS - 1))];
    }
#pragma unroll
    for (int i = 0; i < FillerType::TURNS; ++i) {
      filler.fill(
          stage, i, (const device uint4*)x + (sources[i] + (inside ? k : 0)),
          inside && filler.row + i * FillerType::TURN < count);
    }
  }
  end_copies();
}

// What comes between the product and the activation: nothing.
struct Unnormed {
  // tile: columns `mine` and on, its own weight rows   listed: the tokens, times ROW
  template <int ROW, typename TileType>
  void apply(
      thread TileType&, threadgroup float*, const threadgroup uint*, uint, uint) const thread {}
};

// The threadgroups go round the tiles of 8 * OCTETS * SIMDGROUPS rows of an expert by TOKENS of its
// tokens; how many there are, lies on the device.
//   x: [tokens, HIDDEN]   scores: [tokens, EXPERTS]   up: [EXPERTS, EXPERT_SIZE, HIDDEN]
//   counts, lists: as place_tokens leaves them
//   h: [EXPERTS, tokens, EXPERT_SIZE], row i of an expert for the i-th token of its list; rows
//      behind them stay unwritten
//   memory: [STAGES * Stage::SIZE]   starts: [EXPERTS + 1]   listed, weights: [TOKENS]
// Weights are on their way for DEPTH steps.
template <
    typename T, int TOKENS, int OCTETS, int SIMDGROUPS, int STAGES, int BATCH, int WINDOWS,
    int DEPTH, int EXPERTS, int HIDDEN, int EXPERT_SIZE, bool SILU, typename Weights,
    typename Scores, typename Counts, typename Norm>
void grouped_up_projection(
    const device T* x, Scores scores, Counts counts, const device uint* lists, Norm norm, Weights up,
    device T* h, uint tokens, threadgroup uint4* memory, threadgroup uint* starts,
    threadgroup uint* listed, threadgroup float* weights, uint group, uint groups, uint simdgroup,
    uint lane) {
  typedef StagedTile<T, Weights, OCTETS, TOKENS> TileType;
  typedef typename TileType::Lanes Lanes;
  const int WINDOW = 4 * Weights::span, WIDTH = WINDOWS * WINDOW;
  const int STEPS = (HIDDEN + WIDTH - 1) / WIDTH;
  const int ROWS = 8 * OCTETS * SIMDGROUPS, TILES = (EXPERT_SIZE + ROWS - 1) / ROWS;
  const int THREADS = 32 * SIMDGROUPS;
  typedef Stage<T, TOKENS, WINDOW, WINDOWS> StageType;
  const uint thread_index = simdgroup * 32 + lane;
  const Filler<StageType, TOKENS, THREADS> filler(thread_index);
  list_tiles<EXPERTS, TOKENS>(counts, starts, simdgroup, lane);

  for (uint i = group; i < starts[EXPERTS] * TILES; i += groups) {
    const uint expert = tile_expert<EXPERTS>(starts, i / TILES, lane);
    const uint mine = i % TILES * ROWS + simdgroup * 8 * OCTETS;
    const bool has_rows = mine < uint(EXPERT_SIZE);
    const ulong weight_row = ulong(expert) * EXPERT_SIZE + mine + Lanes::weight_row(lane);
    typename Weights::Span spans[DEPTH][WINDOWS][OCTETS];
    if (has_rows) {
#pragma unroll
      for (int j = 0; j < min(DEPTH, STEPS) * WINDOWS; ++j) {
        load_window<OCTETS, WIDTH>(
            spans[j / WINDOWS][j % WINDOWS], up, weight_row, j * WINDOW, HIDDEN, lane);
      }
    }

    // An expert's tiles are alike, so that threadgroups have about as much to do.
    const uint total = counts[expert], tiles = starts[expert + 1] - starts[expert];
    const uint each = round_up<8 * BATCH>((total + tiles - 1) / tiles);
    const uint first = (i / TILES - starts[expert]) * each, count = min(total - first, each);
    const ulong place = ulong(expert) * tokens + first;
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the last tile has been multiplied
    for (uint j = thread_index; j < TOKENS; j += THREADS) {
      listed[j] = lists[place + min(j, count - 1)] * (HIDDEN / StageType::PIECE);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

#pragma unroll
    for (int step = 0; step + 1 < STAGES; ++step) {
      fill_listed<StageType, TOKENS, STAGES, HIDDEN>(
          x, memory, listed, count, step, filler);
    }
    for (uint j = thread_index; j < TOKENS; j += THREADS) {  // wanted when all is multiplied
      const ulong token = listed[j] / (HIDDEN / StageType::PIECE);
      weights[j] = float(scores[token * EXPERTS + expert]);
    }
    TileType tile;
    tile.clear();
#pragma unroll 1
    for (int from = 0; from < STEPS; from += DEPTH) {
#pragma unroll
      for (int s = 0; s < DEPTH; ++s) {
        const int step = from + s;
        if (s == 0 || step < STEPS) {
          await_copies<STAGES - 2>();
          threadgroup_barrier(mem_flags::mem_threadgroup);
          fill_listed<StageType, TOKENS, STAGES, HIDDEN>(
              x, memory, listed, count, step + STAGES - 1, filler);
          if (has_rows) {
            const StageType stage = StageType::at(memory, step % STAGES);
#pragma unroll
            for (int i = 0; i < WINDOWS; ++i) {
              tile.template add_window<BATCH>(spans[s][i], stage, i, count, lane);
              if (step + DEPTH < STEPS) {
                const uint k = (step + DEPTH) * WIDTH + i * WINDOW;
                load_window<OCTETS, WIDTH>(spans[s][i], up, weight_row, k, HIDDEN, lane);
              }
            }
          }
        }
      }
    }

    norm.template apply<HIDDEN / StageType::PIECE>(
        tile, (threadgroup float*)memory, listed, mine, lane);
    if (has_rows) {
#pragma unroll
      for (int slot = 0; slot < TileType::SLOTS; ++slot) {
        const uint token = Lanes::token(slot, lane);
        if (token < count) {
          float values[TileType::COLUMNS];
#pragma unroll
          for (int j = 0; j < TileType::COLUMNS; ++j) {
            const float z = tile.sums[slot][j];
            values[j] = (SILU ? silu(z) : activate(z, false)) * weights[token];
          }
          store_columns<TileType::COLUMNS>(
              h + (place + token) * EXPERT_SIZE + mine + Lanes::column(lane), values);
        }
      }
    }
  }
}
