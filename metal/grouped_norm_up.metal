// Up projection of a long chunk for DECO's experts (arXiv 2605.10933):
// h = score * silu(RMSNorm(x up^T - mean) * norm), of the tokens that use an expert.
#include <metal_stdlib>
#include "grouped_up.metal"
using namespace metal;

// The norm of an expert's whole width, which is a threadgroup's rows.
//   means: [tokens]   norm: [EXPERT_SIZE]   eps: [4], all the same
template <int EXPERT_SIZE, typename Means, typename Norm, typename Eps>
struct ExpertNorm {
  Means means;
  Norm norm;
  Eps eps;

  // As Unnormed's. Each lane leaves the squares of its columns, and adds those of all lanes.
  //   memory: [TOKENS * EXPERT_SIZE / COLUMNS]
  template <int ROW, typename TileType>
  void apply(
      thread TileType& tile, threadgroup float* memory, const threadgroup uint* listed, uint mine,
      uint lane) const thread {
    typedef typename TileType::Lanes Lanes;
    const int COLUMNS = TileType::COLUMNS, PARTS = EXPERT_SIZE / COLUMNS;
    const uint column = mine + Lanes::column(lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the last stage has been multiplied
#pragma unroll
    for (int slot = 0; slot < TileType::SLOTS; ++slot) {
      const uint token = Lanes::token(slot, lane);
      const float mean = float(means[listed[token] / ROW]);
      float squares = 0.0f;
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        const float value = tile.sums[slot][j] - mean;
        squares += value * value;
        tile.sums[slot][j] = value;
      }
      memory[token * PARTS + column / COLUMNS] = squares;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int slot = 0; slot < TileType::SLOTS; ++slot) {
      float squares = 0.0f;
      for (int part = 0; part < PARTS; ++part) {
        squares += memory[Lanes::token(slot, lane) * PARTS + part];
      }
      const float factor = rsqrt(squares / EXPERT_SIZE + eps[0]);
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        tile.sums[slot][j] *= factor * float(norm[column + j]);
      }
    }
  }
};

template <int EXPERT_SIZE, typename Means, typename Norm, typename Eps>
inline ExpertNorm<EXPERT_SIZE, Means, Norm, Eps> expert_norm(Means means, Norm norm, Eps eps) {
  return {means, norm, eps};
}
