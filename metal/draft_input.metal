// What a draft head begins with: the embedding of a token beside a hidden state, each normed if the
// head norms it, in the launch that looks them up.
#include <metal_stdlib>
#include "simdgroup.metal"
using namespace metal;

// Two threadgroups a row of y: one for either half.
//   table: [any, HIDDEN], of embeddings; places: [rows], the row's   hidden: [any, HIDDEN];
//   sources: [rows], the row's   norm1, norm2: [HIDDEN], read if FIRST and SECOND   numbers: [2],
//   what embeddings are multiplied by, and eps   bias: [HIDDEN]
//   y: [rows, 2 * HIDDEN]   added: [rows, HIDDEN], the bias   sums: [SIMDGROUPS], scratch
template <
    typename T, int HIDDEN, bool FIRST, bool SECOND, int SIMDGROUPS, typename Places,
    typename Sources, typename Numbers>
void draft_input(
    const device T* table, Places places, const device T* hidden, Sources sources,
    const device T* norm1, const device T* norm2, Numbers numbers, const device T* bias,
    device T* y, device T* added, threadgroup float* sums, uint group, uint simdgroup, uint lane) {
  const uint row = group / 2, index = simdgroup * 32 + lane;
  const bool of_hidden = group % 2 == 1, is_normed = of_hidden ? SECOND : FIRST;
  const device T* source =
      of_hidden ? hidden + ulong(sources[row]) * HIDDEN : table + ulong(places[row]) * HIDDEN;
  const device T* norm = of_hidden ? norm2 : norm1;
  const float scale = of_hidden ? 1.0f : float(T(numbers[0]));
  float factor = 1.0f;
  if (is_normed) {
    float squares = 0.0f;
    for (uint i = index; i < HIDDEN; i += SIMDGROUPS * 32) {
      const float value = float(T(float(source[i]) * scale));
      squares += value * value;
    }
    squares = simd_sum(squares);
    if (lane == 0) {
      sums[simdgroup] = squares;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    squares = simd_sum(lane < SIMDGROUPS ? sums[lane] : 0.0f);
    factor = rsqrt(squares / HIDDEN + float(numbers[1]));
  }
  for (uint i = index; i < HIDDEN; i += SIMDGROUPS * 32) {
    const float value = float(T(float(source[i]) * scale));
    // rounded where MLX's own norm rounds: before the weight and behind it
    const T out = is_normed ? T(float(T(value * factor)) * float(norm[i])) : T(value);
    y[ulong(row) * 2 * HIDDEN + of_hidden * HIDDEN + i] = out;
    if (!of_hidden) {
      added[row * HIDDEN + i] = bias[i];
    }
  }
}
