// The union of a chunk: which experts any of its tokens uses.
#pragma once
#include <metal_stdlib>
using namespace metal;

// Lists the active experts in ascending order and returns their count. The scores are so few that
// every threadgroup makes its own list: that costs less than a launch, and nothing has to be read
// back. All threads of the threadgroup call this.
//   scores: [tokens, experts], active where not 0
//   masks:  [max(SIMDGROUPS, 8)], scratch: 32 experts a word
//   list:   [256]
template <int SIMDGROUPS, typename Scores>
uint list_active_experts(
    Scores scores, uint tokens, uint experts, threadgroup uint* masks, threadgroup ushort* list,
    uint simdgroup, uint lane) {
  const uint words = (experts + 31) / 32;
  // Simdgroups left over after one for each word share the tokens among them.
  const uint shares = max(uint(SIMDGROUPS) / words, 1u);
  for (uint i = simdgroup; i < words * shares; i += SIMDGROUPS) {
    const uint expert = i % words * 32 + lane;
    bool used = false;
    if (expert < experts) {
#pragma unroll 16
      for (uint token = i / words; token < tokens; token += shares) {
        used = used || float(scores[token * experts + expert]) != 0.0f;
      }
    }
    const uint mask = uint(simd_vote::vote_t(simd_ballot(used)));
    if (lane == 0) {
      masks[i] = mask;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint count = 0;
  for (uint word = 0; word < words; ++word) {
    uint mask = 0;
    for (uint share = 0; share < shares; ++share) {
      mask |= masks[share * words + word];
    }
    if (word % SIMDGROUPS == simdgroup && (mask >> lane & 1)) {
      const uint rank = popcount(mask & ((1u << lane) - 1));
      list[count + rank] = ushort(word * 32 + lane);
    }
    count += popcount(mask);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return count;
}
