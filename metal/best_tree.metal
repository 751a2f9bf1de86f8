// The best candidates of a draft tree under its root, in level order (EAGLE-2's rerank).
#include <metal_stdlib>
#include "simdgroup.metal"
using namespace metal;

// One threadgroup.
//   root: [1]   nodes: [2, CANDIDATES], token and parent's place, none of them under the root
//   scores: [CANDIDATES]   counts: [any], how many candidates and nodes of the tree there are
//   tree: [6, size]: token, parent's place, rank, depth, and bits of the ancestors and itself
//   values, places: [CANDIDATES], scratch
template <int CANDIDATES, int SIMDGROUPS, typename Root, typename Counts>
void best_tree(
    Root root, const device uint* nodes, const device float* scores, Counts counts,
    device uint* tree, threadgroup float* values, threadgroup uint* places, uint index) {
  const uint count = counts[0], size = counts[1], threads = SIMDGROUPS * 32;
  for (uint j = index; j < count; j += threads) {
    values[j] = scores[j];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // Rank + 1 of the chosen, 0 of others.
  for (uint j = index; j < count; j += threads) {
    uint rank = 0;
    for (uint i = 0; i < count; ++i) {
      rank += values[i] > values[j] || (values[i] == values[j] && i < j);
    }
    places[j] = rank + 1 < size ? rank + 1 : 0;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (index == 0) {
    for (uint i = 0; i < 6; ++i) {
      tree[i * size] = 0;
    }
    tree[0] = root[0];
    tree[size] = 0xffffffffu;
    tree[4 * size] = 1;
  }
  for (uint j = index; j < count; j += threads) {
    if (places[j] > 0) {
      // Its own place and those of its ancestors, found by counting: there are few.
      uint words[2] = {1u, 0u}, depth = 0, place = 0, parent = 0;
      for (uint node = j; node < count; node = nodes[CANDIDATES + node]) {
        uint at = 1;
        for (uint i = 0; i < node; ++i) {
          at += places[i] > 0;
        }
        words[0] |= at < 32 ? 1u << at : 0u;
        words[1] |= at < 32 ? 0u : 1u << at % 32;
        place = depth == 0 ? at : place;
        parent = depth == 1 ? at : parent;
        depth += 1;
      }
      tree[place] = nodes[j];
      tree[size + place] = parent;
      tree[2 * size + place] = places[j];
      tree[3 * size + place] = depth;
      tree[4 * size + place] = words[0];
      tree[5 * size + place] = words[1];
    }
  }
}
