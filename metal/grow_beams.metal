// A level of a draft tree: notes the children of its beams, and chooses the next level's beams.
#include <metal_stdlib>
#include "simdgroup.metal"
using namespace metal;

// One threadgroup.
//   children, logprobs: [rows, TOP], of the first beams; there is one row at level 0, TOP behind it
//   nodes: [2, CANDIDATES], token and parent's place; scores: [CANDIDATES], of all levels so far
//   beams: [3 + WORDS, TOP]: token, row in the level before, place among the candidates, and a bit
//   for each beam of all levels that is an ancestor or itself   beam_scores: [TOP]   level: [any]
//   sums: [TOP * TOP], scratch
template <
    int TOP, int CANDIDATES, int WORDS, int SIMDGROUPS, typename Children, typename Logprobs,
    typename Beams, typename BeamScores, typename Level>
void grow_beams(
    Children children, Logprobs logprobs, const device uint* nodes, const device float* scores,
    Beams beams, BeamScores beam_scores, Level level, device uint* next_nodes,
    device float* next_scores, device uint* next_beams, device float* next_beam_scores,
    threadgroup float* sums, uint index) {
  const uint now = level[0], count = now == 0 ? TOP : TOP * TOP;
  const uint first = now == 0 ? 0 : TOP + (now - 1) * TOP * TOP;
  for (uint j = index; j < CANDIDATES; j += SIMDGROUPS * 32) {
    if (j < first || j >= first + count) {
      next_nodes[j] = nodes[j];
      next_nodes[CANDIDATES + j] = nodes[CANDIDATES + j];
      next_scores[j] = scores[j];
    }
  }
  for (uint j = index; j < count; j += SIMDGROUPS * 32) {
    const float sum = beam_scores[j / TOP] + logprobs[j];
    sums[j] = sum;
    next_nodes[first + j] = children[j];
    next_nodes[CANDIDATES + first + j] = beams[2 * TOP + j / TOP];
    next_scores[first + j] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint j = index; j < count; j += SIMDGROUPS * 32) {
    uint rank = 0;
    for (uint i = 0; i < count; ++i) {
      rank += sums[i] > sums[j] || (sums[i] == sums[j] && i < j);
    }
    if (rank < TOP) {
      const uint row = j / TOP, bit = now * TOP + rank;
      next_beams[rank] = children[j];
      next_beams[TOP + rank] = row;
      next_beams[2 * TOP + rank] = first + j;
      next_beam_scores[rank] = sums[j];
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
        const uint own = bit / 32 == uint(i) ? 1u << bit % 32 : 0u;
        next_beams[(3 + i) * TOP + rank] = beams[(3 + i) * TOP + row] | own;
      }
    }
  }
}
