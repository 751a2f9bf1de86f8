// Down projection: y = sum over the union's experts of h down^T.
#pragma once
#include <metal_stdlib>
#include "staged_tokens.metal"
#include "tile.metal"
using namespace metal;

// What the tile multiplies. The experts of the union stand behind one another along k, so one
// product over all of them is the sum: expert k / EXPERT_SIZE of the list, column k % EXPERT_SIZE.
template <typename T, int EXPERTS, int HIDDEN, int EXPERT_SIZE, typename Active>
struct DownOperands {
  const device T* h;  // [EXPERTS, tokens, EXPERT_SIZE]
  uint tokens;
  uint first_row;  // of the output
  uint length;     // active experts * EXPERT_SIZE
  Active list;
  enum { COLUMNS = EXPERT_SIZE };

  void prepare(uint, uint) const thread {}

  template <int OCTETS, typename Weights>
  void load_rows(thread typename Weights::Span* out, Weights down, uint row, uint k) const thread {
    // Before the length is asked for, so that both come at once; the list is as long as it can be.
    const uint expert = list[min(k / EXPERT_SIZE, uint(EXPERTS - 1))];
    if (k < length) {
      // down as [EXPERTS * HIDDEN, EXPERT_SIZE]
      const Weights rows = down.from_row(ulong(expert) * HIDDEN + first_row + row, EXPERT_SIZE);
#pragma unroll
      for (int i = 0; i < OCTETS; ++i) {
        rows.load(out[i], 8 * i, k % EXPERT_SIZE, EXPERT_SIZE);
      }
    } else {
#pragma unroll
      for (int i = 0; i < OCTETS; ++i) {
        Weights::clear(out[i]);
      }
    }
  }

  const device T* tokens_at(uint k) const thread {
    return h + (k / EXPERT_SIZE * tokens * EXPERT_SIZE + k % EXPERT_SIZE);
  }

  // Tokens past the last repeat it; nobody reads their columns.
  template <int WORDS>
  void load_token(thread uint* out, uint token, uint k) const thread {
    if (k < length) {
      const uint row = k / EXPERT_SIZE * tokens + min(token, tokens - 1);
      copy_words<WORDS>(out, (const device uint*)(h + (row * EXPERT_SIZE + k % EXPERT_SIZE)));
    } else {
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
        out[i] = 0;
      }
    }
  }
};

// What becomes of a sum: a function of its place in y and of the sum.
struct AsSummed {
  float operator()(uint, float sum) const thread {
    return sum;
  }
};

// One threadgroup: outputs [group * 8 * OCTETS, ...) of every token. An empty union sums to zeros.
//   h, active: as up_projection leaves them   down: [EXPERTS, HIDDEN, EXPERT_SIZE]
//   y: [tokens, HIDDEN]
template <
    typename T, bool MATRIX, int TOKENS, int OCTETS, int SIMDGROUPS, int DEPTH, bool AHEAD,
    int EXPERTS, int HIDDEN, int EXPERT_SIZE, typename Weights, typename Active, typename Finish,
    typename Source>
void down_projection(
    const device T* h, Active active, Weights down, device T* y, uint tokens, Finish finish,
    threadgroup float* partials, Source source, uint group, uint simdgroup, uint lane) {
  const int ROWS = 8 * OCTETS;
  const uint first_row = group * ROWS;
  typedef DownOperands<T, EXPERTS, HIDDEN, EXPERT_SIZE, Active> Operands;
  const Operands operands = {h, tokens, first_row, active[0] * EXPERT_SIZE, active + 1};
  Tile<MATRIX, T, Weights, OCTETS, TOKENS> tile;
  stream_rows<OCTETS, SIMDGROUPS, DEPTH, AHEAD>(tile, down, operands, simdgroup, lane, source);
  store_partials<TOKENS, ROWS>(tile, partials, simdgroup, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (uint i = simdgroup * 32 + lane; i < tokens * ROWS; i += SIMDGROUPS * 32) {
    const uint token = i / ROWS, row = i % ROWS;
    const float sum = add_partials<SIMDGROUPS, TOKENS, ROWS>(partials, token, row);
    const uint at = token * HIDDEN + first_row + row;
    y[at] = T(finish(at, sum));
  }
}
