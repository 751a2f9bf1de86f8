// The tokens of short chunks by way of threadgroup memory.
#pragma once
#include <metal_stdlib>
#include "stage.metal"
using namespace metal;

// Each simdgroup brings the tokens of its own windows, whole rows of a window side by side: its
// lanes ask for an eighth of the lines that they would touch if each loaded what it multiplies. No
// other simdgroup has to be waited for. Slots are windows of `memory`.
template <typename T, int TOKENS, int WINDOW>
struct StagedTokens {
  typedef Stage<T, TOKENS, WINDOW, 1> StageType;
  threadgroup uint4* memory;

  // Starts to copy the tokens of the window at `start`, if there is one: TURN of them at a time.
  template <typename Operands>
  void send(Operands operands, uint slot, uint start, uint lane) const thread {
    if (start < operands.length) {
      const int TURN = 32 / StageType::PIECES, TURNS = TOKENS / TURN;
      const uint first = lane / StageType::PIECES, piece = lane % StageType::PIECES;
      const uint k = start + piece * StageType::PIECE, place = StageType::place(first, piece);
      const device T* source = operands.tokens_at(k) + first * Operands::COLUMNS;
      threadgroup uint4* to = StageType::at(memory, slot).data;
#pragma unroll
      for (int turn = 0; turn < TURNS; ++turn) {
        const bool real = first + turn * TURN < operands.tokens && k < operands.length;
        const uint at = (place ^ (turn * TURN / 2 % 4)) + turn * TURN * StageType::PIECES;
        copy_piece(to + at, (const device uint4*)(source + turn * TURN * Operands::COLUMNS), real);
      }
    }
    end_copies();
  }

  // A window, as tile.metal wants it.
  struct Window {
    StageType stage;
    uint start;

    template <int WORDS>
    void load_token(thread uint* out, uint token, uint k) const thread {
      const uint at = StageType::place(token, (k - start) / StageType::PIECE);
#pragma unroll
      for (int i = 0; i < WORDS / 4; ++i) {
        const uint4 piece = stage.data[at ^ i];
        out[4 * i] = piece.x;
        out[4 * i + 1] = piece.y;
        out[4 * i + 2] = piece.z;
        out[4 * i + 3] = piece.w;
      }
    }
  };

  template <int LEFT, typename Operands>
  Window arrived(Operands, uint slot, uint start) const thread {
    await_copies<LEFT>();
    simdgroup_barrier(mem_flags::mem_threadgroup);
    return {StageType::at(memory, slot), start};
  }

  void leave() const thread { simdgroup_barrier(mem_flags::mem_threadgroup); }
};
