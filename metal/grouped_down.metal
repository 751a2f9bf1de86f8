// Down projection of a long chunk: every token's sum over its experts, in their order.
#include <metal_stdlib>
#include "staged.metal"
using namespace metal;

// Where a threadgroup is on its way through the experts: rows [first, end) of an expert's list,
// TOKENS of them at a time, and a step along its weights.
template <int EXPERTS, int TOKENS, int STEPS>
struct Walk {
  const threadgroup uint* ranges;  // [EXPERTS, 2]
  uint expert, first, end, step;

  // From the first expert with rows on.
  void find() thread {
    while (expert < EXPERTS && ranges[2 * expert] == ranges[2 * expert + 1]) {
      ++expert;
    }
    if (expert < EXPERTS) {
      first = ranges[2 * expert];
      end = ranges[2 * expert + 1];
    }
  }
  void advance() thread {
    if (!ended() && ++step == STEPS) {
      step = 0;
      first += TOKENS;
      if (first >= end) {
        ++expert;
        find();
      }
    }
  }
  bool ended() const thread { return expert == EXPERTS; }
  uint count() const thread { return min(end - first, uint(TOKENS)); }
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

// One threadgroup: 8 * OCTETS * SIMDGROUPS outputs of BLOCK tokens, which stay in threadgroup memory
// while the experts pass. A sum of a simdgroup's is nobody else's, so the experts' order is kept.
//   h: as grouped_up_projection leaves it   lists, blocks: as place_tokens leaves them, for BLOCK
//   down: [EXPERTS, HIDDEN, EXPERT_SIZE]   y: [tokens, HIDDEN]
//   memory: [STAGES * TOKENS * Stage::STRIDE], and BLOCK * ROWS sums; ROWS is a multiple of 32
//   ranges: [2 * EXPERTS]   listed: [STAGES * TOKENS]
template <
    typename T, int TOKENS, int OCTETS, int SIMDGROUPS, int STAGES, int BATCH, int BLOCK,
    int WINDOWS, int EXPERTS, int HIDDEN, int EXPERT_SIZE, typename Weights, typename Blocks>
void grouped_down_projection(
    const device T* h, const device uint* lists, Blocks blocks, Weights down, device T* y,
    uint tokens, threadgroup uint4* memory, threadgroup uint* ranges,
    threadgroup uint* listed, uint group, uint simdgroup, uint lane) {
  const int WINDOW = 4 * Weights::span, WIDTH = WINDOWS * WINDOW;
  const int STEPS = (EXPERT_SIZE + WIDTH - 1) / WIDTH;
  const int ROWS = 8 * OCTETS * SIMDGROUPS;
  typedef Stage<T, TOKENS, WIDTH> StageType;
  typedef Walk<EXPERTS, TOKENS, STEPS> WalkType;
  threadgroup float* const sums =
      (threadgroup float*)(memory + STAGES * TOKENS * StageType::STRIDE);
  const uint thread_index = simdgroup * 32 + lane, quarter = lane_quarter(lane);
  const uint num_blocks = (tokens + BLOCK - 1) / BLOCK, block = group % num_blocks;
  const uint first_row = group / num_blocks * ROWS;
  for (uint i = thread_index; i < 2 * EXPERTS; i += SIMDGROUPS * 32) {
    ranges[i] = blocks[i / 2 * (num_blocks + 1) + block + i % 2];
  }
  for (uint i = thread_index; i < BLOCK * ROWS; i += SIMDGROUPS * 32) {
    sums[i] = 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const uint mine = simdgroup * 8 * OCTETS, row = first_row + mine + lane_row(lane);
  const bool has_rows = first_row + mine < uint(HIDDEN);
  typename Weights::Span spans[WINDOWS][OCTETS], next[WINDOWS][OCTETS];
  Tile<true, T, Weights, OCTETS, TOKENS> tile;
  tile.clear();
  WalkType now = {ranges, 0, 0, 0, 0};
  now.find();
  WalkType ahead = now, coming = now;  // where copies, and where loads of weights have got to
  if (has_rows && !now.ended()) {
    load_step<OCTETS, WINDOWS>(
        next, down, ulong(now.expert) * HIDDEN + row, quarter * Weights::span, EXPERT_SIZE);
  }
  coming.advance();

  uint filling = 0;
#pragma unroll 1
  for (int i = 1 - STAGES; !now.ended(); ++i) {
    if (i >= 0) {
      await_copies<STAGES - 2>();
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (!ahead.ended()) {
      const StageType stage = StageType::at(memory, filling);
      const uint count = ahead.count();
      const uint filled = round_up<8 * BATCH>(count);
      const ulong place = ulong(ahead.expert) * tokens + ahead.first;
      for (uint j = thread_index; j < filled * StageType::PIECES; j += SIMDGROUPS * 32) {
        const uint piece = j % StageType::PIECES, at = min(j / StageType::PIECES, count - 1);
        const uint k = ahead.step * WIDTH + piece * StageType::PIECE;
        const bool real = k < uint(EXPERT_SIZE);
        const device T* source = h + ((place + at) * EXPERT_SIZE + (real ? k : 0));
        stage.fill(j / StageType::PIECES, piece, (const device uint4*)source, real);
      }
      for (uint j = thread_index; j < count; j += SIMDGROUPS * 32) {
        copy_word(listed + filling * TOKENS + j, lists + (place + j));
      }
      ahead.advance();
    }
    end_copies();
    filling = filling + 1 == STAGES ? 0 : filling + 1;
    if (i < 0) {
      continue;
    }
    const uint multiplied = filling;  // the stage that will be filled next is the oldest
    if (has_rows) {
#pragma unroll
      for (int i = 0; i < WINDOWS * OCTETS; ++i) {
        spans[i / OCTETS][i % OCTETS] = next[i / OCTETS][i % OCTETS];
      }
      if (!coming.ended()) {
        const uint k = coming.step * WIDTH + quarter * Weights::span;
        load_step<OCTETS, WINDOWS>(
            next, down, ulong(coming.expert) * HIDDEN + row, k, EXPERT_SIZE);
      }
#pragma unroll
      for (int i = 0; i < WINDOWS; ++i) {
        const StageType stage = StageType::at(memory, multiplied);
        add_window<BATCH>(tile, spans[i], stage, i * WINDOW, now.count(), lane);
      }
      if (now.step == STEPS - 1) {
#pragma unroll
        for (int n = 0; n < TOKENS / 8; ++n) {
          if (8 * uint(n) < now.count()) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const uint place = 8 * n + 2 * quarter + j;
              if (place < now.count()) {
                const uint token = listed[multiplied * TOKENS + place] % BLOCK;
                // Tokens lie in different banks, as far as four go.
                const uint at = token * ROWS + ((mine + lane_row(lane)) ^ (token % 4 * 8));
#pragma unroll
                for (int octet = 0; octet < OCTETS; ++octet) {
                  sums[at ^ (8 * octet)] += tile.sums[octet][n][j];
                }
              }
            }
          }
        }
        tile.clear();
      }
    }
    coming.advance();
    now.advance();
  }

  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_index; i < BLOCK * ROWS; i += SIMDGROUPS * 32) {
    const uint token = i / ROWS, column = i % ROWS;
    if (block * BLOCK + token < tokens && first_row + column < uint(HIDDEN)) {
      y[ulong(block * BLOCK + token) * HIDDEN + first_row + column] =
          T(sums[token * ROWS + (column ^ (token % 4 * 8))]);
    }
  }
}
