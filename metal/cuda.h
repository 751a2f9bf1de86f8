// The Metal names that the kernels use, for mx.fast.cuda_kernel. Takes the place of
// simdgroup.metal and of Metal's own headers. MLX compiles with NVRTC and
// --device-as-default-execution-space, so nothing here says __device__.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// ---- Metal's names
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long long ulong;
typedef __nv_bfloat16 bfloat;

template <typename To, typename From>
__forceinline__ To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

namespace metal {
enum class mem_flags { mem_none, mem_device, mem_threadgroup };

struct simd_vote {
  typedef ulong vote_t;
  vote_t bits;
  explicit operator vote_t() const { return bits; }
};
}  // namespace metal
using namespace metal;

__forceinline__ uint popcount(uint bits) {
  return __popc(bits);
}
__forceinline__ simd_vote simd_ballot(bool vote) {
  return {__ballot_sync(0xffffffffu, vote)};
}
template <typename T>
__forceinline__ T simd_shuffle_xor(T value, ushort mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <typename T>
__forceinline__ T simd_sum(T value) {
  for (int mask = 16; mask > 0; mask /= 2) {
    value += simd_shuffle_xor(value, ushort(mask));
  }
  return value;
}
__forceinline__ uint simd_prefix_inclusive_sum(uint value) {
  for (int step = 1; step < 32; step *= 2) {
    const uint before = __shfl_up_sync(0xffffffffu, value, step);
    value += threadIdx.x % 32 >= step ? before : 0;
  }
  return value;
}
__forceinline__ void threadgroup_barrier(mem_flags) {
  __syncthreads();
}
__forceinline__ void simdgroup_barrier(mem_flags) {
  __syncwarp();
}

#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#define simdgroup_index_in_threadgroup (threadIdx.x / 32)
#define thread_index_in_simdgroup (threadIdx.x % 32)
#define inline __forceinline__
#define device
#define thread
#define threadgroup

#include "words.metal"

// ---- simdgroup.metal, for mma.sync: lane l holds two neighbours of row l / 4.
inline uint lane_row(uint lane) {
  return lane / 4;
}
inline uint lane_quarter(uint lane) {
  return lane % 4;
}

inline float sum_quarters(float value) {
  value += simd_shuffle_xor(value, ushort(1));
  return value + simd_shuffle_xor(value, ushort(2));
}

inline uint4 load_once(const uint4* source) {
  uint4 out;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
      : "l"(source));
  return out;
}

inline uint shared_address(const void* pointer) {
  return uint(__cvta_generic_to_shared(pointer));
}
inline void copy_piece(uint4* to, const uint4* source, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(source), "r"(real ? 16 : 0) : "memory");
}
inline void copy_word(uint* to, const uint* source) {
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(source) : "memory");
}
inline void end_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int LEFT>
inline void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Weight j of packed words. Bits stay where they lie as long as that is below 2^23, and the scale
// makes up for it; 2^23 + value is cheaper here than a conversion.
template <int BITS, typename T>
inline float affine_value(const uint* words, int j, T scale, T bias) {
  const int bit = j * BITS % 32, shift = bit + BITS <= 23 ? 0 : 16;
  const uint packed = words[j * BITS / 32] >> shift & (((1u << BITS) - 1) << (bit - shift));
  const float value = as_type<float>(0x4b000000u | packed) - 8388608.0f;
  return value * (float(scale) / float(1u << (bit - shift))) + float(bias);
}

// ---- Affine weights as pairs of 16 bits, which is what the matrix unit takes. Four bits: elements
// 8 * w + p and 8 * w + p + 4 in pair 4 * w + p, since one mask finds both; eight: neighbours.
inline uint merge_nibbles(uint word, uint magic) {
  uint out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(word), "n"(0x000f000f), "r"(magic));
  return out;
}
inline uint unpack_nibbles(uint word, half scale, half bias) {
  const __half2 value = __hsub2(
      as_type<__half2>(merge_nibbles(word, 0x64006400u)), as_type<__half2>(0x64006400u));
  return as_type<uint>(__hfma2(value, __half2half2(scale), __half2half2(bias)));
}
inline uint unpack_nibbles(uint word, bfloat scale, bfloat bias) {
  const __nv_bfloat162 value = __hsub2(
      as_type<__nv_bfloat162>(merge_nibbles(word, 0x43004300u)),
      as_type<__nv_bfloat162>(0x43004300u));
  return as_type<uint>(__hfma2(value, __bfloat162bfloat162(scale), __bfloat162bfloat162(bias)));
}
inline uint pack_pair(float low, float high, half) {
  return as_type<uint>(__floats2half2_rn(low, high));
}
inline uint pack_pair(float low, float high, bfloat) {
  return as_type<uint>(__floats2bfloat162_rn(low, high));
}
template <typename T>
inline uint affine_pair(const uint* words, int bits, int j, T scale, T bias) {
  if (bits == 4) {
    return unpack_nibbles(words[j / 4] >> (j % 4 * 4), scale, bias);
  }
  // 2^23 + byte, as float
  const uint word = words[j / 2], first = 0x7540 + j % 2 * 2;
  const float low = as_type<float>(__byte_perm(word, 0x4b000000u, first)) - 8388608.0f;
  const float high = as_type<float>(__byte_perm(word, 0x4b000000u, first + 1)) - 8388608.0f;
  return pack_pair(
      low * float(scale) + float(bias), high * float(scale) + float(bias), scale);
}

// The 16-row instruction takes two octets at once.
#define ROW_STEP 2

// As column `row` of the 16x8 operand a lane brings both halves of its quarter's span. Spans lie
// `reach` apart, halves `apart`.
struct TokenHalves {
  uint token0, token1, k0, k1;
  inline TokenHalves(uint row, uint quarter, uint reach, uint apart)
      : token0(row), token1(row), k0(quarter * reach), k1(quarter * reach + apart) {}
};

inline void multiply_16x8x16(
    float* c0, float* c1, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1, half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c0[0]), "+f"(c0[1]), "+f"(c1[0]), "+f"(c1[1])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
inline void multiply_16x8x16(
    float* c0, float* c1, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1, bfloat) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c0[0]), "+f"(c0[1]), "+f"(c1[0]), "+f"(c1[1])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The operands want pairs of neighbours, which is what memory holds.
template <typename T, typename Weights, int OCTETS>
struct MatrixRows {
  typedef T Type;
  enum { SPAN = Weights::span, PARTS = 1, STEPS = SPAN / 2 };
  uint pairs[OCTETS][SPAN / 2];

  inline MatrixRows(const typename Weights::Span* spans, int) {
#pragma unroll
    for (int i = 0; i < OCTETS; ++i) {
#pragma unroll
      for (int j = 0; j < SPAN / 2; ++j) {
        pairs[i][j] = spans[i].pair(j);
      }
    }
  }

  // Pair j of a lane's tokens, in the order of the weights' pairs.
  static inline uint token_pair(const uint* x, int j) {
    if (!Weights::interleaved) {
      return x[j];
    }
    const uint* four = x + j / 4 * 4 + j % 4 / 2;
    return __byte_perm(four[0], four[2], j % 2 ? 0x7632 : 0x5410);
  }

  inline void multiply(int i, const uint* x0, const uint* x1, float* sums0, float* sums1) const {
#pragma unroll
    for (int j = 0; j < SPAN / 2; j += 2) {
      const uint* x = j < SPAN / 4 ? x0 : x1;
      const int k = j % (SPAN / 4);
      multiply_16x8x16(
          sums0, sums1, pairs[i][j], pairs[i + 1][j], pairs[i][j + 1], pairs[i + 1][j + 1],
          token_pair(x, k), token_pair(x, k + 1), T(0));
    }
  }
};

// ---- Long chunks (staged.metal): here the tokens are the 16 rows of the instruction, so that a
// lane's sums are of neighbouring columns.
// Columns 2 * quarter and + 1 of each octet are a lane's, and lie next to each other.
template <int OCTETS>
struct SumLanes {
  enum { COLUMNS = 2 * OCTETS, SLOTS = 1, ROW_STRIDE = 2 };
  static inline uint weight_row(uint lane) {
    return lane_row(lane) / 2 * COLUMNS + lane_row(lane) % 2;
  }
  static inline uint column(uint lane) { return lane_quarter(lane) * COLUMNS; }
  static inline uint token(uint slot, uint lane) { return 8 * slot + lane_row(lane); }
};

// The same word in a register of its own: the instruction wants four neighbours, and what a load has
// put elsewhere would be moved for each use.
inline uint moved(uint word, uint zero) {
  return word ^ zero;
}

template <int COLUMNS, typename Rows, typename Eight>
inline void multiply_tokens(const Rows& rows, const Eight* eights, float (*sums)[COLUMNS]) {
  const uint zero = blockIdx.y;  // which the compiler does not know
#pragma unroll
  for (int j = 0; j < Rows::SPAN / 2; j += 2) {
    const int half = j < Rows::SPAN / 4 ? 0 : 1, k = j % (Rows::SPAN / 4);
    const uint *x = eights[0].x[half], *y = eights[1].x[half];
    const uint words[4] = {
        moved(Rows::token_pair(x, k), zero), moved(Rows::token_pair(y, k), zero),
        moved(Rows::token_pair(x, k + 1), zero), moved(Rows::token_pair(y, k + 1), zero)};
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) {
      multiply_16x8x16(
          sums[0] + 2 * i, sums[1] + 2 * i, words[0], words[1], words[2], words[3],
          rows.pairs[i][j], rows.pairs[i][j + 1], typename Rows::Type(0));
    }
  }
}

// Good for numbers of 16 bits.
inline float silu(float z) {
  return __fdividef(z, 1.0f + __expf(-z));
}
