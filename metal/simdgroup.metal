// What a simdgroup's matrix unit wants from each lane, and how lanes unpack weights. The CUDA build has its own version of this
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

// Two numbers of 16 bits in one word. The last argument only names the type.
template <typename T>
inline uint pack_pair(float low, float high, T) {
  return uint(as_type<ushort>(T(low))) | uint(as_type<ushort>(T(high))) << 16;
}

inline uint4 load_once(const device uint4* source) {
  return *source;
}

// Copies to threadgroup memory, which on CUDA go on while their thread does: they have ended when
// all but the LEFT latest of the batches that it ended are awaited. Here they end at once.
inline void copy_piece(threadgroup uint4* to, const device uint4* source, bool real) {
  *to = real ? *source : uint4(0);
}
inline void copy_word(threadgroup uint* to, const device uint* source) {
  *to = *source;
}
inline void end_copies() {}
template <int LEFT>
inline void await_copies() {}

// Weight j of packed words. A byte or, shifted to bits 4 to 7, a nibble is put into the mantissa of
// the half-precision number 1024: two weights at once and without a conversion, which runs at a
// quarter of the rate. The scale and the bias take the 1024 away again.
template <int BITS, typename T>
inline float affine_value(const thread uint* words, int j, T scale, T bias) {
  const uint word = words[j * BITS / 32];
  const int n = j % 4;
  uint pair;
  if (BITS == 4) {  // nibbles n and n + 4, as 1024 + 16 * weight
    pair = (n == 0 ? word << 4 : word >> (4 * n - 4)) & 0x00f000f0u;
  } else {  // bytes n and n + 2, as 1024 + weight
    pair = word >> (n % 2 * 8) & 0x00ff00ffu;
  }
  const bool high = BITS == 4 ? j % 8 >= 4 : n >= 2;
  const float value = float(as_type<half>(ushort((pair | 0x64006400u) >> (high ? 16 : 0))));
  const float unit = BITS == 4 ? 16.0f : 1.0f, offset = 1024.0f / unit;
  if (sizeof(T) == 4) {  // as exact as its scale: one operation more
    return (value / unit - offset) * float(scale) + float(bias);
  }
  return value * (float(scale) / unit) + (float(bias) - offset * float(scale));
}

// Octets of rows that one multiplication takes.
#define ROW_STEP 1

// Where a lane's two half spans of the token operand lie in a window: as row `row` of the 8x8
// operand it brings element k + j in step j, for columns 2 * quarter and + 1: row 2 * n the first
// half of quarter n's span, the next row the other. Spans lie `reach` apart, halves `apart`.
struct TokenHalves {
  uint token0, token1, k0, k1;
  TokenHalves(uint row, uint quarter, uint reach, uint apart) thread
      : token0(2 * quarter),
        token1(2 * quarter + 1),
        k0(row / 2 * reach + row % 2 * apart),
        k1(k0) {}
};

// A part of a lane's spans of the weight operand, which takes that many registers less than the
// whole. In step j it brings elements j and span / 2 + j, which are columns 2 * quarter and
// 2 * quarter + 1 of the operand, the same k as above.
template <typename T, typename Weights, int OCTETS>
struct MatrixRows {
  enum { SPAN = Weights::span, PARTS = SPAN > 16 ? SPAN / 16 : 1, STEPS = SPAN / 2 / PARTS };
  float values[OCTETS][2][STEPS];

  MatrixRows(const thread typename Weights::Span* spans, int part) thread {
#pragma unroll
    for (int i = 0; i < OCTETS; ++i) {
#pragma unroll
      for (int j = 0; j < STEPS; ++j) {
        values[i][0][j] = spans[i].value(part * STEPS + j);
        values[i][1][j] = spans[i].value(SPAN / 2 + part * STEPS + j);
      }
    }
  }

  // sums += rows of octet i by 8 tokens, whose half spans (their part) are x0 and x1.
  void multiply(
      int i, const thread uint* x0, const thread uint* x1, thread float* sums,
      thread float*) const thread {
    simdgroup_matrix<float, 8, 8> a, b, c;
    c.thread_elements()[0] = sums[0];
    c.thread_elements()[1] = sums[1];
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {
      a.thread_elements()[0] = values[i][0][j];
      a.thread_elements()[1] = values[i][1][j];
      b.thread_elements()[0] = element(x0, j, T(0));
      b.thread_elements()[1] = element(x1, j, T(0));
      simdgroup_multiply_accumulate(c, a, b, c);
    }
    sums[0] = c.thread_elements()[0];
    sums[1] = c.thread_elements()[1];
  }
};

// ---- Long chunks (staged.metal).
// What a lane holds of 8 * OCTETS columns: COLUMNS neighbours, for SLOTS tokens of each eight. It
// streams the weight rows of its columns, one an octet.
template <int OCTETS>
struct SumLanes {
  enum { COLUMNS = OCTETS, SLOTS = 2, ROW_STRIDE = 1 };
  static uint weight_row(uint lane) { return OCTETS * lane_row(lane); }
  static uint column(uint lane) { return OCTETS * lane_row(lane); }
  static uint token(uint slot, uint lane) {
    return slot / 2 * 8 + 2 * lane_quarter(lane) + slot % 2;
  }
};

// sums += two eights of tokens by the weight rows.
template <int OCTETS, typename Rows, typename Eight>
inline void multiply_tokens(
    const thread Rows& rows, const thread Eight* eights, thread float (*sums)[OCTETS]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < OCTETS; ++i) {
      float pair[2] = {sums[2 * n][i], sums[2 * n + 1][i]};
      rows.multiply(i, eights[n].x[0], eights[n].x[1], pair, pair);
      sums[2 * n][i] = pair[0];
      sums[2 * n + 1][i] = pair[1];
    }
  }
}

inline float silu(float z) {
  return z / (1.0f + exp(-z));
}
