// What a simdgroup's matrix unit wants from each lane. The CUDA build has its own version of this
// file's names (cuda.h), because there the lanes lie otherwise; the kernels are the same.
#pragma once
#include <metal_simdgroup_matrix>
#include <metal_stdlib>
#include "words.metal"
using namespace metal;

// simdgroup_matrix: lane l holds two neighbours of row (l / 4 & 4) + l / 2 % 4, the columns
// 2 * quarter and 2 * quarter + 1.
inline uint lane_row(uint lane) {
  return (lane / 4 & 4) + lane / 2 % 4;
}
inline uint lane_quarter(uint lane) {
  return (lane / 4 & 2) + lane % 2;
}

// Sum over the four lanes of a row.
inline float sum_quarters(float value) {
  value += simd_shuffle_xor(value, ushort(1));
  return value + simd_shuffle_xor(value, ushort(8));
}

inline uint4 load_once(const device uint4* source) {
  return *source;
}

inline float to_float(uint value) {
  return float(value);
}

// Octets of rows that one multiplication takes.
#define ROW_STEP 1

// Where a lane's two half spans of the token operand lie in a window: as row `row` of the 8x8
// operand it brings k = row * span / 2 + j in step j, for columns 2 * quarter and + 1.
struct TokenHalves {
  uint token0, token1, k0, k1;
  TokenHalves(uint row, uint quarter, uint span) thread
      : token0(2 * quarter), token1(2 * quarter + 1), k0(row * span / 2), k1(row * span / 2) {}
};

// A lane's spans of the weight operand. In step j it brings elements j and span / 2 + j, which
// are columns 2 * quarter and 2 * quarter + 1 of the operand, the same k as above.
template <typename T, typename Weights, int OCTETS>
struct MatrixRows {
  enum { SPAN = Weights::span };
  float values[OCTETS][SPAN];

  MatrixRows(const thread typename Weights::Span* spans) thread {
#pragma unroll
    for (int i = 0; i < OCTETS; ++i) {
#pragma unroll
      for (int j = 0; j < SPAN; ++j) {
        values[i][j] = spans[i].value(j);
      }
    }
  }

  // sums += rows of octet i by 8 tokens, whose half spans are x0 and x1.
  void multiply(
      int i, const thread uint* x0, const thread uint* x1, thread float* sums,
      thread float*) const thread {
    simdgroup_matrix<float, 8, 8> a, b, c;
    c.thread_elements()[0] = sums[0];
    c.thread_elements()[1] = sums[1];
#pragma unroll
    for (int j = 0; j < SPAN / 2; ++j) {
      a.thread_elements()[0] = values[i][j];
      a.thread_elements()[1] = values[i][SPAN / 2 + j];
      b.thread_elements()[0] = element(x0, j, T(0));
      b.thread_elements()[1] = element(x1, j, T(0));
      simdgroup_multiply_accumulate(c, a, b, c);
    }
    sums[0] = c.thread_elements()[0];
    sums[1] = c.thread_elements()[1];
  }
};
