// The union of a chunk: which experts any of its tokens uses.
#pragma once
#include <metal_stdlib>
using namespace metal;

// Lists the active experts in ascending order and returns their count. The scores are so few that
// every threadgroup makes its own list: that costs less than a launch, and nothing has to be read
// back. All threads of the threadgroup call this.
//   scores: [tokens, EXPERTS], active where not 0; at most TOKENS tokens
//   masks:  [max(SIMDGROUPS, 8)], scratch: 32 experts a word
//   list:   [EXPERTS]
template <int EXPERTS, int TOKENS, int SIMDGROUPS, typename Scores>
inline uint list_active_experts(
    Scores scores, uint tokens, threadgroup uint* masks, threadgroup ushort* list, uint simdgroup,
    uint lane) {
  const int words = (EXPERTS + 31) / 32;
  // Simdgroups left over after one for each word share the tokens among them.
  const int shares = SIMDGROUPS < words ? 1 : SIMDGROUPS / words;
  // Loads that are on their way at once; past the end they repeat the last token.
  const int most = (TOKENS + shares - 1) / shares, batch = most < 16 ? most : 16;
  for (uint i = simdgroup; i < words * shares; i += SIMDGROUPS) {
    const uint expert = i % words * 32 + lane;
    uint used = 0;
    if (expert < EXPERTS) {
      for (uint first = i / words; first < tokens; first += batch * shares) {
#pragma unroll
        for (int j = 0; j < batch; ++j) {
          const uint token = min(first + j * shares, tokens - 1);
          used |= uint(float(scores[token * EXPERTS + expert]) != 0.0f);
        }
      }
    }
    const uint mask = uint(simd_vote::vote_t(simd_ballot(used != 0)));
    if (lane == 0) {
      masks[i] = mask;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint count = 0;
#pragma unroll
  for (int word = 0; word < words; ++word) {
    uint mask = 0;
#pragma unroll
    for (int share = 0; share < shares; ++share) {
      mask |= masks[share * words + word];
    }
    if (uint(word) % SIMDGROUPS == simdgroup && (mask >> lane & 1)) {
      list[count + popcount(mask & ((1u << lane) - 1))] = ushort(word * 32 + lane);
    }
    count += popcount(mask);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return count;
}
