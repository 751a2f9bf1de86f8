// Sums a token's rows, one from each of its experts: the way back from tokens grouped by expert.
#include <metal_stdlib>
#include "simdgroup.metal"
#include "union.metal"
using namespace metal;

// One threadgroup a token, so that the order of the sum is that of the experts.
//   rows:   [any, HIDDEN]
//   places: [tokens, EXPERTS], 1 + the row that an expert made for a token, or 0
//   y:      [tokens, HIDDEN]
template <typename T, int EXPERTS, int HIDDEN, int SIMDGROUPS, typename Places>
void combine_rows(
    const device T* rows, Places places, device T* y, threadgroup uint* masks,
    threadgroup ushort* list, uint token, uint simdgroup, uint lane) {
  const int PIECE = 16 / sizeof(T);  // elements that a thread takes at a time
  const auto mine = places + token * EXPERTS;
  const uint count = list_active_experts<EXPERTS, 1, SIMDGROUPS>(
      mine, 1, masks, list, simdgroup, lane);
  for (uint i = simdgroup * 32 + lane; i < HIDDEN / PIECE; i += SIMDGROUPS * 32) {
    float sums[PIECE];
#pragma unroll
    for (int j = 0; j < PIECE; ++j) {
      sums[j] = 0.0f;
    }
#pragma unroll 4
    for (uint k = 0; k < count; ++k) {
      uint words[4];
      const ulong row = mine[list[k]] - 1;
      copy_words<4>(words, (const device uint*)(rows + (row * HIDDEN + i * PIECE)));
#pragma unroll
      for (int j = 0; j < PIECE; ++j) {
        sums[j] += element(words, j, T(0));
      }
    }
#pragma unroll
    for (int j = 0; j < PIECE; ++j) {
      y[ulong(token) * HIDDEN + i * PIECE + j] = T(sums[j]);
    }
  }
}
