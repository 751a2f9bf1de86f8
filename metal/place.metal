// Lists the tokens of each expert: what the products of a long chunk go by.
#include <metal_stdlib>
#include "simdgroup.metal"
using namespace metal;

// One threadgroup an expert; its simdgroups take runs of 32 tokens in turn, first to count them.
//   scores: [tokens, EXPERTS], active where not 0
//   counts: [EXPERTS], tokens of each expert
//   lists:  [EXPERTS, tokens], those tokens, ascending; what lies behind them stays unwritten
//   blocks: [EXPERTS, 1 + blocks], how many of them come before each block of BLOCK tokens, a
//           multiple of 32, and at the end their count
//   totals: [SIMDGROUPS], scratch
template <int EXPERTS, int BLOCK, int SIMDGROUPS, typename Scores>
void place_tokens(
    Scores scores, device uint* counts, device uint* lists, device uint* blocks,
    uint tokens, threadgroup uint* totals, uint expert, uint simdgroup, uint lane) {
  const uint runs = (tokens + 31) / 32, share = (runs + SIMDGROUPS - 1) / SIMDGROUPS;
  const uint first = simdgroup * share, last = min(first + share, runs);
  uint mine = 0;
  for (uint run = first; run < last; ++run) {
    const uint token = run * 32 + lane;
    const bool used =
        token < tokens && float(scores[ulong(token) * EXPERTS + expert]) != 0.0f;
    mine += uint(used);
  }
  mine = simd_sum(mine);
  if (lane == 0) {
    totals[simdgroup] = mine;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint place = 0, total = 0;
#pragma unroll
  for (int i = 0; i < SIMDGROUPS; ++i) {
    place += uint(i) < simdgroup ? totals[i] : 0;
    total += totals[i];
  }
  const uint num_blocks = (tokens + BLOCK - 1) / BLOCK;
  device uint* const starts = blocks + expert * (num_blocks + 1);
  if (simdgroup == 0 && lane == 0) {
    counts[expert] = starts[num_blocks] = total;
  }
  for (uint run = first; run < last; ++run) {
    const uint token = run * 32 + lane;
    const bool used =
        token < tokens && float(scores[ulong(token) * EXPERTS + expert]) != 0.0f;
    const uint mask = uint(simd_vote::vote_t(simd_ballot(used)));
    if (lane == 0 && run * 32 % BLOCK == 0) {
      starts[run * 32 / BLOCK] = place;
    }
    if (used) {
      lists[ulong(expert) * tokens + place + popcount(mask & ((1u << lane) - 1))] = token;
    }
    place += popcount(mask);
  }
}
