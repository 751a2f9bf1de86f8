// Down projection of a long chunk: every token's sum over its experts, in their order.
#include <metal_stdlib>
#include "staged.metal"
using namespace metal;

// A threadgroup's way through the experts: rows [first, first + count) of an expert's list, at most
// TOKENS at a time, and a step along its weights. A count of 0 is the end.
struct Step {
  uint expert, first, count, step;
};

// The experts that a block of tokens uses, in ascending order: a row of each one's list to begin
// with, and expert << 16 | number of rows. Returns how many there are.
template <int EXPERTS, typename Blocks>
inline uint list_ranges(
    Blocks blocks, uint num_blocks, uint block, threadgroup uint* ranges, threadgroup uint* total,
    uint simdgroup, uint lane) {
  if (simdgroup == 0) {
    uint before = 0;
#pragma unroll
    for (int i = 0; i < (EXPERTS + 31) / 32; ++i) {
      const uint expert = i * 32 + lane, at = min(expert, uint(EXPERTS - 1)) * (num_blocks + 1);
      const uint first = blocks[at + block], end = blocks[at + block + 1];
      const bool used = expert < EXPERTS && first < end;
      const uint mask = uint(simd_vote::vote_t(simd_ballot(used)));
      if (used) {
        const uint place = 2 * (before + popcount(mask & ((1u << lane) - 1)));
        ranges[place] = first;
        ranges[place + 1] = expert << 16 | (end - first);
      }
      before += popcount(mask);
    }
    if (lane == 0) {
      total[0] = before;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return total[0];
}

template <int TOKENS, int STEPS>
struct Walk {
  const threadgroup uint* ranges;  // as list_ranges leaves them
  uint total, at, offset, step;

  // The step that it has come to; it goes on to the next.
  Step next() thread {
    if (at == total) {
      return {0, 0, 0, 0};
    }
    const uint word = ranges[2 * at + 1], rows = word & 0xffffu;
    const Step found = {
        word >> 16, ranges[2 * at] + offset, min(rows - offset, uint(TOKENS)), step};
    if (++step == STEPS) {
      step = 0;
      offset += TOKENS;
      if (offset >= rows) {
        offset = 0;
        ++at;
      }
    }
    return found;
  }
};

// The weight rows of a simdgroup in the windows of a step.
template <int OCTETS, int WINDOWS, typename Weights>
inline void load_step(
    thread typename Weights::Span (*spans)[OCTETS], Weights weights, ulong row, uint k,
    uint columns) {
#pragma unroll
  for (int i = 0; i < WINDOWS; ++i) {
    load_window<OCTETS>(spans[i], weights, row, k + i * 4 * Weights::span, columns);
  }
}

// Where a token's sum for a column lies. The quarters of a simdgroup add for four tokens at once,
// each a different one of its octets, so these lie in different banks; with fewer than four octets
// tokens take turns for the rest.
template <int OCTETS, int ROWS>
inline uint sum_place(uint token, uint column) {
  return token * ROWS + (column ^ (token % (4 / OCTETS) * (8 * OCTETS)));
}

// values[i] becomes values[i ^ quarter % OCTETS], without an address that is known late.
template <int OCTETS>
inline void turn_octets(thread float* values, uint quarter) {
#pragma unroll
  for (int bit = 1; bit < OCTETS; bit *= 2) {
    const bool turned = quarter & bit;
#pragma unroll
    for (int i = 0; i < OCTETS; ++i) {
      if ((i & bit) == 0) {
        const float first = values[i], second = values[i + bit];
        values[i] = turned ? second : first;
        values[i + bit] = turned ? first : second;
      }
    }
  }
}

// Adds a tile to the sums of its tokens, and clears it. What is added to has been read before
// anything is written, since a compiler cannot know that all places are different.
//   listed: [count, and to the next multiple of 8 * BATCH] tokens, of which a block has BLOCK
template <int OCTETS, int BATCH, int BLOCK, int ROWS, typename TileType>
inline void add_tile(
    thread TileType& tile, threadgroup float* sums, const threadgroup uint* listed, uint count,
    uint column, uint lane) {
  const uint quarter = lane_quarter(lane), mine = column + lane_row(lane);
#pragma unroll
  for (int first = 0; first < TileType::columns; first += BATCH) {
    if (8 * uint(first) < count) {
      uint places[2 * BATCH];
      bool real[2 * BATCH];
      float before[2 * BATCH][OCTETS];
#pragma unroll
      for (int i = 0; i < 2 * BATCH; ++i) {
        const uint at = 8 * (first + i / 2) + i % 2;
        real[i] = 2 * quarter + at < count;
        places[i] = sum_place<OCTETS, ROWS>(listed[2 * quarter + at] % BLOCK, mine) ^
            (8 * (quarter % OCTETS));
      }
#pragma unroll
      for (int i = 0; i < 2 * BATCH; ++i) {
#pragma unroll
        for (int octet = 0; octet < OCTETS; ++octet) {
          before[i][octet] = real[i] ? sums[places[i] ^ (8 * octet)] : 0.0f;
        }
      }
#pragma unroll
      for (int i = 0; i < 2 * BATCH; ++i) {
        float added[OCTETS];
#pragma unroll
        for (int octet = 0; octet < OCTETS; ++octet) {
          added[octet] = tile.sums[octet][first + i / 2][i % 2];
        }
        turn_octets<OCTETS>(added, quarter);
        if (real[i]) {
#pragma unroll
          for (int octet = 0; octet < OCTETS; ++octet) {
            sums[places[i] ^ (8 * octet)] = before[i][octet] + added[octet];
          }
        }
      }
    }
  }
  tile.clear();
}

// One threadgroup: 8 * OCTETS * SIMDGROUPS outputs of BLOCK tokens, which stay in threadgroup memory
// while the experts pass. A sum of a simdgroup's is nobody else's, so the experts' order is kept.
//   h: as grouped_up_projection leaves it   lists, blocks: as place_tokens leaves them, for BLOCK
//   down: [EXPERTS, HIDDEN, EXPERT_SIZE]   y: [tokens, HIDDEN]
//   memory: [STAGES * TOKENS * Stage::STRIDE], and BLOCK * ROWS sums; ROWS is a multiple of 32
//   ranges: [2 * EXPERTS]   listed: [STAGES * TOKENS]   total: [1]
template <
    typename T, int TOKENS, int OCTETS, int SIMDGROUPS, int STAGES, int BATCH, int BLOCK,
    int WINDOWS, int EXPERTS, int HIDDEN, int EXPERT_SIZE, typename Weights, typename Blocks>
void grouped_down_projection(
    const device T* h, const device uint* lists, Blocks blocks, Weights down, device T* y,
    uint tokens, threadgroup uint4* memory, threadgroup uint* ranges, threadgroup uint* listed,
    threadgroup uint* total, uint group, uint simdgroup, uint lane) {
  const int WINDOW = 4 * Weights::span, WIDTH = WINDOWS * WINDOW;
  const int STEPS = (EXPERT_SIZE + WIDTH - 1) / WIDTH;
  const int ROWS = 8 * OCTETS * SIMDGROUPS, THREADS = 32 * SIMDGROUPS;
  typedef Stage<T, TOKENS, WIDTH> StageType;
  threadgroup float* const sums =
      (threadgroup float*)(memory + STAGES * TOKENS * StageType::STRIDE);
  const uint thread_index = simdgroup * 32 + lane, quarter = lane_quarter(lane);
  const uint num_blocks = (tokens + BLOCK - 1) / BLOCK, block = group % num_blocks;
  const uint first_row = group / num_blocks * ROWS;
  for (uint i = thread_index; i < BLOCK * ROWS; i += THREADS) {
    sums[i] = 0.0f;
  }
  Walk<TOKENS, STEPS> walk = {ranges, 0, 0, 0, 0};
  walk.total = list_ranges<EXPERTS>(blocks, num_blocks, block, ranges, total, simdgroup, lane);

  const uint mine = simdgroup * 8 * OCTETS, row = first_row + mine + lane_row(lane);
  const bool has_rows = first_row + mine < uint(HIDDEN);
  typename Weights::Span spans[WINDOWS][OCTETS], next[WINDOWS][OCTETS];
  Tile<true, T, Weights, OCTETS, TOKENS> tile;
  tile.clear();
  Step steps[STAGES];  // the one that is multiplied, and those on their way
#pragma unroll
  for (int i = 0; i < STAGES; ++i) {
    steps[i] = {0, 0, 0, 0};
  }

  uint filling = 0;
#pragma unroll 1
  for (int i = 1 - STAGES; i < 0 || steps[1].count; ++i) {
    if (i >= 0) {
      await_copies<STAGES - 2>();
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
#pragma unroll
    for (int j = 0; j + 1 < STAGES; ++j) {
      steps[j] = steps[j + 1];
    }
    const Step ahead = steps[STAGES - 1] = walk.next();
    if (ahead.count) {
      const StageType stage = StageType::at(memory, filling);
      const uint filled = round_up<8 * BATCH>(ahead.count);
      const ulong place = ulong(ahead.expert) * tokens + ahead.first;
      const device T* const rows = h + place * EXPERT_SIZE;
#pragma unroll
      for (int j = 0; j < (TOKENS * StageType::PIECES + THREADS - 1) / THREADS; ++j) {
        const uint at = j * THREADS + thread_index, to = at / StageType::PIECES;
        const uint piece = at % StageType::PIECES, k = ahead.step * WIDTH + piece * StageType::PIECE;
        if (to < filled) {  // rows of nobody are zeros
          const bool real = to < ahead.count && (EXPERT_SIZE % WIDTH == 0 || k < uint(EXPERT_SIZE));
          const device T* source = rows + (to * EXPERT_SIZE + k);
          stage.fill(to, piece, (const device uint4*)source, real);
        }
      }
#pragma unroll
      for (int j = 0; j < (TOKENS + THREADS - 1) / THREADS; ++j) {
        const uint to = j * THREADS + thread_index;
        if (to < filled) {
          copy_word(listed + filling * TOKENS + to, lists + (place + min(to, ahead.count - 1)));
        }
      }
    }
    end_copies();
    filling = filling + 1 == STAGES ? 0 : filling + 1;
    if (has_rows && i >= 0) {
#pragma unroll
      for (int j = 0; j < WINDOWS * OCTETS; ++j) {
        spans[j / OCTETS][j % OCTETS] = next[j / OCTETS][j % OCTETS];
      }
    }
    const Step coming = steps[1];
    if (has_rows && i >= -1 && coming.count) {
      const uint k = coming.step * WIDTH + quarter * Weights::span;
      load_step<OCTETS, WINDOWS>(next, down, ulong(coming.expert) * HIDDEN + row, k, EXPERT_SIZE);
    }
    if (has_rows && i >= 0) {
      // the stage that will be filled next is the oldest
#pragma unroll
      for (int j = 0; j < WINDOWS; ++j) {
        const StageType stage = StageType::at(memory, filling);
        add_window<BATCH>(tile, spans[j], stage, j * WINDOW, steps[0].count, lane);
      }
      if (steps[0].step == STEPS - 1) {
        add_tile<OCTETS, BATCH, BLOCK, ROWS>(
            tile, sums, listed + filling * TOKENS, steps[0].count, mine, lane);
      }
    }
  }

  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_index; i < BLOCK * ROWS; i += THREADS) {
    const uint token = i / ROWS, column = i % ROWS;
    if (block * BLOCK + token < tokens && first_row + column < uint(HIDDEN)) {
      y[ulong(block * BLOCK + token) * HIDDEN + first_row + column] =
          T(sums[sum_place<OCTETS, ROWS>(token, column)]);
    }
  }
}
