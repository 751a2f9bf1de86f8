// Activations and weights as 32-bit words of device memory.
#pragma once
#include <metal_stdlib>
using namespace metal;

// Element j of packed words, as float. The last argument only names the type.
inline float element(const thread uint* words, int j, float) {
  return as_type<float>(words[j]);
}
inline float element(const thread uint* words, int j, half) {
  return float(as_type<half>(ushort(words[j / 2] >> (j % 2 * 16))));
}
inline float element(const thread uint* words, int j, bfloat) {
  return as_type<float>(j % 2 ? words[j / 2] & 0xffff0000u : words[j / 2] << 16);
}

// Copies words in 16-byte pieces, from a multiple of 16 bytes.
template <int COUNT>
inline void copy_words(thread uint* words, const device uint* source) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    const uint4 piece = *(const device uint4*)(source + i);
    words[i] = piece.x;
    words[i + 1] = piece.y;
    words[i + 2] = piece.z;
    words[i + 3] = piece.w;
  }
}
