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

// A plain matrix [rows, columns].
template <typename T>
struct PlainWeights {
  enum { span = 32 / sizeof(T), interleaved = false };  // span: neighbours that one lane takes
  struct Span {
    uint words[8];
    float value(int j) const thread { return element(words, j, T(0)); }
    uint pair(int j) const thread { return words[j]; }  // for cuda.h: the 16-bit elements 2 * j, 2 * j + 1
  };
  const device T* data;

  void load(thread Span& out, ulong row, uint column, uint columns) const thread {
    stream_words<8>(out.words, (const device uint*)(data + (row * columns + column)));
  }
  static void clear(thread Span& out) {
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
    // Bits stay where they lie as long as that is below 2^23, and the scale makes up for it.
    float value(int j) const thread {
      const int bit = j * BITS % 32, shift = bit + BITS <= 23 ? 0 : 16;
      const uint packed = words[j * BITS / 32] >> shift & (((1u << BITS) - 1) << (bit - shift));
      return to_float(packed) * (float(scale) / float(1u << (bit - shift))) + float(bias);
    }
    uint pair(int j) const thread { return affine_pair(words, BITS, j, scale, bias); }
  };
  const device uint* data;
  const device T* scales;
  const device T* biases;

  void load(thread Span& out, ulong row, uint column, uint columns) const thread {
    stream_words<4>(out.words, data + (row * columns + column) / (32 / BITS));
    const ulong group = (row * columns + column) / GROUP;
    out.scale = scales[group];
    out.bias = biases[group];
  }
  static void clear(thread Span& out) {
    for (int i = 0; i < 4; ++i) {
      out.words[i] = 0;
    }
    out.scale = out.bias = T(0);
  }
};
