// Expert weights: what a lane holds of a row while it streams by, plain or quantised.
#pragma once
#include <metal_stdlib>
#include "simdgroup.metal"
#include "words.metal"
using namespace metal;

// copy_words for weights, which nobody reads twice: they need no place in the nearest cache.
template <int COUNT>
inline void stream_words(thread uint* words, const device uint* source) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    const uint4 piece = load_once((const device uint4*)(source + i));
    words[i] = piece.x;
    words[i + 1] = piece.y;
    words[i + 2] = piece.z;
    words[i + 3] = piece.w;
  }
}

// A plain matrix [rows, columns], at a multiple of 16 bytes.
template <typename T>
struct PlainWeights {
  enum { span = 32 / sizeof(T), interleaved = false };  // span: neighbours that one lane takes
  struct Span {
    uint words[8];
    float value(int j) const thread { return element(words, j, T(0)); }
    uint pair(int j) const thread { return words[j]; }  // for cuda.h: elements 2 * j and 2 * j + 1
  };
  const device T* data;

  // From a row on. One product in 64 bits; within an expert 32 bits are enough.
  PlainWeights from_row(ulong row, uint columns) const thread { return {data + row * columns}; }
  void load(thread Span& out, uint row, uint column, uint columns) const thread {
    stream_words<8>(out.words, (const device uint*)(data + (row * columns + column)));
  }
  static void clear(thread Span& out) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      out.words[i] = 0;
    }
  }
};

// A matrix [rows, columns] as mx.quantize packs it: BITS a weight, lowest bits first, and
// weight = scale * packed + bias with one scale and bias, [rows, columns / GROUP], a group.
template <typename T, int BITS, int GROUP>
struct AffineWeights {
  enum { span = 128 / BITS, interleaved = BITS == 4 };
  struct Span {
    uint words[4];
    T scale, bias;
    float value(int j) const thread { return affine_value<BITS>(words, j, scale, bias); }
    uint pair(int j) const thread { return affine_pair(words, BITS, j, scale, bias); }
  };
  const device uint* data;  // at a multiple of 16 bytes
  const device T* scales;
  const device T* biases;

  AffineWeights from_row(ulong row, uint columns) const thread {
    const ulong groups = row * (columns / GROUP);
    return {data + row * (columns * BITS / 32), scales + groups, biases + groups};
  }
  void load(thread Span& out, uint row, uint column, uint columns) const thread {
    const uint element = row * columns + column;
    stream_words<4>(out.words, data + element / (32 / BITS));
    out.scale = scales[element / GROUP];
    out.bias = biases[element / GROUP];
  }
  static void clear(thread Span& out) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out.words[i] = 0;
    }
    out.scale = out.bias = T(0);
  }
};
