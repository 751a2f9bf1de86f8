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

// Where a token's sum for a column lies. Neighbours of up to 8 stay together. With fewer than four
// octets a simdgroup's columns fill a part of the banks only, and tokens take turns for it.
template <int OCTETS, int ROWS>
inline uint sum_place(uint token, uint column) {
  return token * ROWS + (column ^ (token % (4 / OCTETS) * (8 * OCTETS)));
}

// Neighbouring sums, in fours where there are; `turned` fours come in the other order, which gives
// lanes different banks.
template <int COLUMNS>
inline void load_sums(thread float* values, const threadgroup float* sums, bool turned) {
  if (COLUMNS % 4 == 0) {
    const threadgroup float4* const fours = (const threadgroup float4*)sums;
    const int last = COLUMNS / 4 - 1;
    const float4 first = fours[turned ? last : 0], second = fours[turned ? 0 : last];
    const float4 low = turned ? second : first, high = turned ? first : second;
    values[0] = low.x;
    values[1] = low.y;
    values[2] = low.z;
    values[3] = low.w;
    values[4 * last] = high.x;
    values[4 * last + 1] = high.y;
    values[4 * last + 2] = high.z;
    values[4 * last + 3] = high.w;
  } else {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
      values[i] = sums[i];
    }
  }
}
template <int COLUMNS>
inline void store_sums(threadgroup float* sums, const thread float* values, bool turned) {
  if (COLUMNS % 4 == 0) {
    threadgroup float4* const fours = (threadgroup float4*)sums;
    const int last = COLUMNS / 4 - 1;
    const thread float* const v = values + 4 * last;
    float4 low, high;
    low.x = values[0];
    low.y = values[1];
    low.z = values[2];
    low.w = values[3];
    high.x = v[0];
    high.y = v[1];
    high.z = v[2];
    high.w = v[3];
    fours[turned ? last : 0] = turned ? high : low;
    if (last > 0) {
      fours[turned ? 0 : last] = turned ? low : high;
    }
  } else {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
      sums[i] = values[i];
    }
  }
}

// A tile goes on from the sums of its tokens, and leaves them where they were.
//   sums: of tokens from `block` on   column: the lane's first
//   listed: tokens of rows, to the next multiple of 8 * BATCH of `count`
template <bool STORE, int OCTETS, int BATCH, int ROWS, typename TileType>
inline void move_sums(
    thread TileType& tile, threadgroup float* sums, uint block, const threadgroup uint* listed,
    uint count, uint column, uint lane) {
  typedef typename TileType::Lanes Lanes;
  const int COLUMNS = TileType::COLUMNS, SLOTS = BATCH * Lanes::SLOTS;
  const bool turned = COLUMNS == 8 && lane_row(lane) % 2;
#pragma unroll
  for (int first = 0; first < TileType::SLOTS; first += SLOTS) {
    if (first == 0 || 8 * uint(first / Lanes::SLOTS) < count) {
      threadgroup float* places[SLOTS];
#pragma unroll
      for (int i = 0; i < SLOTS; ++i) {
        const uint token = listed[Lanes::token(first + i, lane)];
        places[i] = sums + (sum_place<OCTETS, ROWS>(token, column) - block * ROWS);
      }
#pragma unroll
      for (int i = 0; i < SLOTS; ++i) {
        if (STORE) {
          store_sums<COLUMNS>(places[i], tile.sums[first + i], turned);
        } else {
          load_sums<COLUMNS>(tile.sums[first + i], places[i], turned);
        }
      }
    }
  }
}

// Starts to fill a stage with a step of h, and lists its tokens. Rows of nobody are zeros, and go to
// places from `nobody` on.
template <
    typename StageType, int BATCH, int TOKENS, int THREADS, int EXPERT_SIZE, typename T,
    typename FillerType>
inline void fill_step(
    const device T* h, const device uint* lists, Step step, uint tokens, threadgroup uint4* memory,
    threadgroup uint* listed, uint number, uint nobody, FillerType filler,
    uint thread_index) {
  const int WIDTH = StageType::PIECES * StageType::PIECE;
  if (step.count) {
    const StageType stage = StageType::at(memory, number);
    const ulong place = ulong(step.expert) * tokens + step.first;
    const uint k = step.step * WIDTH + filler.piece * StageType::PIECE;
    const bool inside = EXPERT_SIZE % WIDTH == 0 || k < uint(EXPERT_SIZE);
    const device T* const source = h + (place * EXPERT_SIZE + (filler.row * EXPERT_SIZE + k));
#pragma unroll
    for (int i = 0; i < FillerType::TURNS; ++i) {
      filler.fill(
          stage, i, (const device uint4*)(source + i * (FillerType::TURN * EXPERT_SIZE)),
          inside && filler.row + i * FillerType::TURN < step.count);
    }
#pragma unroll
    for (int i = 0; i < (TOKENS + THREADS - 1) / THREADS; ++i) {
      const uint to = i * THREADS + thread_index;
      if (to < step.count) {
        copy_word(listed + number * TOKENS + to, lists + (place + to));
      } else if (to < uint(TOKENS)) {
        listed[number * TOKENS + to] = nobody + to % (8 * BATCH);
      }
    }
  }
  end_copies();
}

// One threadgroup: 8 * OCTETS * SIMDGROUPS outputs of BLOCK tokens, which stay in threadgroup memory
// while the experts pass. A sum of a simdgroup's is nobody else's, so the experts' order is kept.
//   h: as grouped_up_projection leaves it   lists, blocks: as place_tokens leaves them, for BLOCK
//   down: [EXPERTS, HIDDEN, EXPERT_SIZE]   y: [tokens, HIDDEN]
//   memory: [STAGES * Stage::SIZE], and (BLOCK + 8 * BATCH) * ROWS sums, the last of nobody's;
//           ROWS is a multiple of 32
//   ranges: [2 * EXPERTS]   listed: [STAGES * TOKENS]   total: [1]
// Weights are on their way for DEPTH steps, less than STAGES.
template <
    typename T, int TOKENS, int OCTETS, int SIMDGROUPS, int STAGES, int BATCH, int WINDOWS,
    int DEPTH, int BLOCK, int EXPERTS, int HIDDEN, int EXPERT_SIZE, typename Weights,
    typename Blocks>
void grouped_down_projection(
    const device T* h, const device uint* lists, Blocks blocks, Weights down, device T* y,
    uint tokens, threadgroup uint4* memory, threadgroup uint* ranges, threadgroup uint* listed,
    threadgroup uint* total, uint group, uint simdgroup, uint lane) {
  typedef StagedTile<T, Weights, OCTETS, TOKENS> TileType;
  typedef typename TileType::Lanes Lanes;
  const int WINDOW = 4 * Weights::span, WIDTH = WINDOWS * WINDOW;
  const int STEPS = (EXPERT_SIZE + WIDTH - 1) / WIDTH;
  const int ROWS = 8 * OCTETS * SIMDGROUPS, THREADS = 32 * SIMDGROUPS;
  typedef Stage<T, TOKENS, WINDOW, WINDOWS> StageType;
  threadgroup float* const sums = (threadgroup float*)(memory + STAGES * StageType::SIZE);
  const uint thread_index = simdgroup * 32 + lane;
  const uint num_blocks = (tokens + BLOCK - 1) / BLOCK, block = group % num_blocks;
  const uint first_row = group / num_blocks * ROWS;
  uint4 zeros;
  zeros.x = zeros.y = zeros.z = zeros.w = 0;
  for (uint i = thread_index; i < (BLOCK + 8 * BATCH) * ROWS / 4; i += THREADS) {
    memory[STAGES * StageType::SIZE + i] = zeros;
  }
  const Filler<StageType, TOKENS, THREADS> filler(thread_index);
  Walk<TOKENS, STEPS> walk = {ranges, 0, 0, 0, 0};
  walk.total = list_ranges<EXPERTS>(blocks, num_blocks, block, ranges, total, simdgroup, lane);

  Step steps[STAGES];  // the one that is multiplied, and those on their way
#pragma unroll
  for (int i = 1; i < STAGES; ++i) {
    steps[i] = walk.next();
    fill_step<StageType, BATCH, TOKENS, THREADS, EXPERT_SIZE>(
        h, lists, steps[i], tokens, memory, listed, i - 1, (block + 1) * BLOCK,
        filler, thread_index);
  }
  const uint mine = simdgroup * 8 * OCTETS, column = mine + Lanes::column(lane);
  const uint row = first_row + mine + Lanes::weight_row(lane);
  const bool has_rows = first_row + mine < uint(HIDDEN);
  typename Weights::Span spans[DEPTH][WINDOWS][OCTETS];
#pragma unroll
  for (int i = 0; i < DEPTH * WINDOWS; ++i) {
    const Step coming = steps[1 + i / WINDOWS];
    if (has_rows && coming.count) {
      load_window<OCTETS, WIDTH>(
          spans[i / WINDOWS][i % WINDOWS], down, ulong(coming.expert) * HIDDEN + row,
          coming.step * WIDTH + i % WINDOWS * WINDOW, EXPERT_SIZE, lane);
    }
  }

  TileType tile;
  tile.clear();
  uint number = 0;  // of the stage that is multiplied
#pragma unroll 1
  while (steps[1].count) {
#pragma unroll
    for (int s = 0; s < DEPTH; ++s) {
      if (s == 0 || steps[1].count) {
        await_copies<STAGES - 2>();
        threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
        for (int i = 0; i + 1 < STAGES; ++i) {
          steps[i] = steps[i + 1];
        }
        const StageType stage = StageType::at(memory, number);
        const threadgroup uint* const here = listed + number * TOKENS;
        if (has_rows && (STEPS == 1 || steps[0].step == 0)) {
          move_sums<false, OCTETS, BATCH, ROWS>(
              tile, sums, block * BLOCK, here, steps[0].count, column, lane);
        }
        steps[STAGES - 1] = walk.next();
        fill_step<StageType, BATCH, TOKENS, THREADS, EXPERT_SIZE>(
            h, lists, steps[STAGES - 1], tokens, memory, listed,
            number == 0 ? STAGES - 1 : number - 1, (block + 1) * BLOCK, filler, thread_index);
        if (has_rows) {
          const Step coming = steps[DEPTH];
#pragma unroll
          for (int i = 0; i < WINDOWS; ++i) {
            tile.template add_window<BATCH>(spans[s][i], stage, i, steps[0].count, lane);
            if (coming.count) {
              load_window<OCTETS, WIDTH>(
                  spans[s][i], down, ulong(coming.expert) * HIDDEN + row,
                  coming.step * WIDTH + i * WINDOW, EXPERT_SIZE, lane);
            }
          }
          if (STEPS == 1 || steps[0].step == STEPS - 1) {
            move_sums<true, OCTETS, BATCH, ROWS>(
                tile, sums, block * BLOCK, here, steps[0].count, column, lane);
          }
        }
        number = number + 1 == STAGES ? 0 : number + 1;
      }
    }
  }

  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = 8 * thread_index; i < BLOCK * ROWS; i += 8 * THREADS) {
    const uint token = i / ROWS, first = i % ROWS;
    if (block * BLOCK + token < tokens && first_row + first < uint(HIDDEN)) {
      float values[8];
      load_sums<8>(values, sums + sum_place<OCTETS, ROWS>(token, first), false);
      store_columns<8>(y + (ulong(block * BLOCK + token) * HIDDEN + first_row + first), values);
    }
  }
}
