"""The lane arithmetic of metal/cuda.h as Metal text, so that the harness can run it.

What is CUDA's own (its matrix instruction, its copies) is put in terms of shuffles and plain
copies, and the unpacking of weights by what it comes to; where lanes lie in the matrix unit, and
who holds what, is cuda.h's text unchanged.
"""

from importlib import resources

from blockffn_mlx.kernels.text import read_source

# The instruction by its definition: lane l has elements 2 * (l % 4) and the next of rows l / 4.
MULTIPLY = """
template <typename T>
inline void multiply_16x8x16(
    thread float* c0, thread float* c1, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1, T) {
  const uint lane = msl_rt_lane(), row = lane / 4, quarter = lane % 4;
  for (uint k = 0; k < 4; ++k) {
    const ushort from = ushort(4 * row + k);
    const uint left[4] = {simd_shuffle(a0, from), simd_shuffle(a2, from),
                          simd_shuffle(a1, from), simd_shuffle(a3, from)};
    for (uint j = 0; j < 2; ++j) {
      const ushort column = ushort(4 * (2 * quarter + j) + k);
      const uint right[2] = {simd_shuffle(b0, column), simd_shuffle(b1, column)};
      for (int half_k = 0; half_k < 2; ++half_k) {
        for (int i = 0; i < 2; ++i) {
          c0[j] += element(left + half_k, i, T(0)) * element(right + half_k, i, T(0));
          c1[j] += element(left + 2 + half_k, i, T(0)) * element(right + half_k, i, T(0));
        }
      }
    }
  }
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __expf(float a) {
  return exp(a);
}
inline uint __byte_perm(uint a, uint b, uint selected) {
  uint out = 0;
  for (uint i = 0; i < 4; ++i) {
    const uint at = selected >> (4 * i) & 7;
    out |= ((at < 4 ? a >> (8 * at) : b >> (8 * (at - 4))) & 255) << (8 * i);
  }
  return out;
}
template <typename T>
inline uint affine_pair(const thread uint* words, int bits, int j, T scale, T bias) {
  const uint word = bits == 4 ? words[j / 4] >> (j % 4 * 4) : words[j / 2] >> (j % 2 * 16);
  const uint low = bits == 4 ? word & 15 : word & 255;
  const uint high = bits == 4 ? word >> 16 & 15 : word >> 8 & 255;
  return pack_pair(
      float(low) * float(scale) + float(bias), float(high) * float(scale) + float(bias), scale);
}
constant struct { uint y; } blockIdx = {0};
"""


def between(text: str, start: str, end: str) -> str:
    """From the one place of `start` to the one place of `end` behind it."""
    assert text.count(start) == 1, start
    text = text[text.index(start) :]
    return text[: text.index(end)] if end else text


def read_with_cuda_lanes(name: str, replaced: dict[str, str]) -> str:
    """A kernel's Metal text, but with CUDA's lanes."""
    whole, metal = read_source(name, replaced), read_source("simdgroup.metal", {})
    assert whole.count(metal) == 1
    return whole.replace(metal, cuda_lanes())


def cuda_lanes() -> str:
    """What stands for simdgroup.metal's text."""
    folder = resources.files("blockffn_mlx.metal")
    cuda, metal = (folder.joinpath(n).read_text() for n in ("cuda.h", "simdgroup.metal"))
    return "".join(
        [
            read_source("words.metal", {}),
            between(cuda, "inline uint lane_row", "inline uint4 load_once"),
            between(metal, "// Two numbers of 16 bits", "// Octets of rows"),
            MULTIPLY,
            between(cuda, "#define ROW_STEP", "inline void multiply_16x8x16("),
            between(cuda, "// The operands want pairs", ""),
        ]
    )
