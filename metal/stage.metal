// Tokens in threadgroup memory.
#pragma once
#include <metal_stdlib>
#include "simdgroup.metal"
using namespace metal;

// A stage: [TOKENS, WINDOWS * WINDOW] in pieces of 16 bytes, which change places within eights so
// that the lanes of a load are in different banks.
template <typename T, int TOKENS, int WINDOW, int WINDOWS>
struct Stage {
  enum {
    PIECE = 16 / sizeof(T),
    WINDOW_PIECES = WINDOW / PIECE,
    PIECES = WINDOWS * WINDOW_PIECES,
    SIZE = TOKENS * PIECES
  };
  threadgroup uint4* data;

  // The stage of a number; `memory` has room for SIZE pieces each.
  static Stage at(threadgroup uint4* memory, uint stage) { return {memory + stage * SIZE}; }

  // Eight rows further, or a window, it is as much further; and so it is for the pieces of a half
  // span, but with an exclusive or.
  static uint place(uint row, uint piece) {
    const uint eight = WINDOW_PIECES > 8 ? piece / 8 % 2 : 0;
    return row * PIECES + (piece ^ eight ^ (row % 2 * 7) ^ (row / 2 % 4));
  }
};
