// Heads of queries, keys and values out of one product, in the order in which attention and a cache
// want them; queries and keys turned by their positions.
#include <metal_stdlib>
#include "simdgroup.metal"
using namespace metal;

// A thread takes two elements, half a head apart, which positions turn together.
//   x: [batch, tokens, (HEADS + 2 * KV_HEADS) * DIMS]   positions: [batch * tokens and more]
//   periods: [DIMS / 2], positions of a turn by one radian
//   queries: [batch, HEADS, tokens, DIMS]   both: [2 * batch, KV_HEADS, tokens, DIMS], keys first
template <
    typename T, int HEADS, int KV_HEADS, int DIMS, typename X, typename Positions, typename Periods>
void rotate_heads(
    X x, Positions positions, Periods periods, device T* queries, device T* both, uint batch,
    uint tokens, uint thread_index) {
  const uint HALF = DIMS / 2, ALL = HEADS + 2 * KV_HEADS;
  const uint pair = thread_index % HALF, head = thread_index / HALF % ALL;
  const uint row = thread_index / HALF / ALL, sequence = row / tokens, token = row % tokens;
  if (sequence >= batch) {
    return;
  }
  const ulong from = ulong(row * ALL + head) * DIMS + pair;
  float first = float(x[from]), second = float(x[from + HALF]);
  device T* to = queries;
  uint place = sequence * HEADS + head;
  if (head >= HEADS) {
    const uint part = (head - HEADS) / KV_HEADS, own = (head - HEADS) % KV_HEADS;
    to = both;
    place = (part * batch + sequence) * KV_HEADS + own;
  }
  if (head < HEADS + KV_HEADS) {
    const float angle = float(positions[row]) / periods[pair];
    const float cosine = cos(angle), sine = sin(angle), turned = first * cosine - second * sine;
    second = first * sine + second * cosine;
    first = turned;
  }
  const ulong at = ulong(place * tokens + token) * DIMS + pair;
  to[at] = T(first);
  to[at + HALF] = T(second);
}
