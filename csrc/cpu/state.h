// The running softmax of a tile of queries over tiles of keys (Milakov and Gimelshein 2018).
#pragma once

#include <cmath>

#include "tiles.h"
#include "work.h"

namespace fastattn::FASTATTN_ISA {

// The running result of a tile of queries; the maximum is of what tiles hold (holds_products).
struct State {
  float *max, *sum, *out;  // [BLOCK_M], [BLOCK_M], [width][BLOCK_M]

  // Floats that it takes.
  static int64_t size(const Params& p) { return BLOCK_M * (2 + padded(p.head_dim_v)); }

  explicit State(float* at) : max(at), sum(at + BLOCK_M), out(at + 2 * BLOCK_M) {}
  void clear(int64_t width) {
    for (int lane = 0; lane < BLOCK_M; ++lane) max[lane] = -kInfinity;
    std::memset(sum, 0, (1 + width) * BLOCK_M * sizeof(float));
  }
  void scale(int n, vf factor, int64_t width) {
    store(sum + n, load(sum + n) * factor);
    for (int64_t d = 0; d < width; ++d) store(out + d * BLOCK_M + n, load(out + d * BLOCK_M + n) * factor);
  }
  // Raise the maximum of the lanes from n on; returns what to subtract before multiplying by `factor`.
  vf raise(int n, vf found, float factor, int64_t width) {
    const vf before = load(max + n), now = larger(before, found);
    const vf shift = now == splat(-kInfinity) ? vf{} : now;
    if (any(now != before)) {
      store(max + n, now);
      if (any(before != splat(-kInfinity))) scale(n, exp2((before - shift) * factor), width);
    }
    return shift;
  }
};

// What differences of a tile's numbers are multiplied by to be powers of two.
INLINE float to_power(const Params& p) { return to_score(p) * kLog2E; }

// What a tile holds -> weights in place, with the running maximum and sum. The maximum is subtracted before `factor`
// comes in: its own weight is exactly 1, however large the scores, which rounding a product first would not give.
static void online_softmax_step(int vectors, int keys, float* s, float factor, State& state, int64_t width) {
  for (int n = 0; n < vectors * VL; n += VL) {
    vf found = splat(-kInfinity);
    for (int j = 0; j < keys; ++j) found = larger(found, load(s + j * BLOCK_M + n));
    const vf shift = state.raise(n, found, factor, width);
    vf even = vf{}, odd = vf{};
    for (int j = 0; j < keys; j += 2) {
      const vf first = exp2((load(s + j * BLOCK_M + n) - shift) * factor);
      const vf second = exp2((load(s + (j + 1) * BLOCK_M + n) - shift) * factor);
      even = even + first;
      odd = odd + second;
      store(s + j * BLOCK_M + n, first);
      store(s + (j + 1) * BLOCK_M + n, second);
    }
    store(state.sum + n, load(state.sum + n) + (even + odd));
  }
}

// max * unit + log(sum) as a float and what rounding takes from it. Beside a large maximum a float has no place for the
// logarithm of the sum. The product is rounded where the backward rounds it (product_less).
INLINE vf log_sum(vf max, vf sum, float unit, vf* low) {
  vf rest;
  const vf score = rounded(max * unit), other = logarithm(sum, &rest);
  if (FUSES) rest = rest + product_less(max, splat(unit), score);
  // Knuth's sum of two numbers, which loses nothing, twice.
  const vf both = score + other, part = both - score;
  rest = rest + ((score - (both - part)) + (other - part));
  const vf whole = both + rest, added = whole - both;
  const vi finite = (whole < kInfinity) & (whole > -kInfinity);
  *low = finite ? (both - (whole - added)) + (rest - added) : vf{};
  return finite ? whole : score + rest;
}

// Writes the lse of a tile's lanes, and what rounding takes from it, and gives what their out is to be multiplied by.
// max, sum and factor are [BLOCK_M], or as many whole vectors as hold the lanes. A largest score below the range, -inf,
// is seen by nobody; one above it makes lse inf and the row NaN.
static void finish_lanes(const Params& p, const QueryTile& tile, const float* max, const float* sum, float* factor) {
  alignas(64) float lse[BLOCK_M], low[BLOCK_M];
  for (int n = 0; n < tile.count; n += VL) {
    const vf most = load(max + n), all = load(sum + n);
    const vf largest = most * splat(to_score(p));
    const vi none = (largest == splat(-kInfinity)) & (all == all), overflows = largest == splat(kInfinity);
    const vi edge = none | overflows;
    vf rest;
    const vf found = log_sum(edge ? vf{} : most, edge ? splat(1.0f) : all, to_score(p), &rest);
    store(lse + n, edge ? largest : found);
    store(low + n, edge ? vf{} : rest);
    store(factor + n, none ? vf{} : overflows ? splat(NAN) : 1.0f / all);
  }
  for (int lane = 0; lane < tile.count; ++lane) {
    const int64_t h = tile.head[lane], row = (tile.b * p.num_heads + h) * p.q_len + tile.q_idx[lane];
    p.lse[row] = lse[lane];
    if (p.lse_low) p.lse_low[row] = low[lane];
    if (p.sinks && factor[lane] != 0.0f) factor[lane] *= left_by_sink(p.sinks[h], lse[lane], low[lane]);
  }
}

// out and lse of a finished tile.
static void finish_tile(const Params& p, const QueryTile& tile, const State& state) {
  alignas(64) float factor[BLOCK_M];
  finish_lanes(p, tile, state.max, state.sum, factor);
  write_lanes(p.out, tile, p.head_dim_v, state.out, factor, p.out_low);
}

}  // namespace fastattn::FASTATTN_ISA
