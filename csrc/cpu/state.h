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
static void soften(int vectors, int keys, float* s, float factor, State& state, int64_t width) {
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

// Writes the lse of a tile's lane, and gives what its out is to be multiplied by.
INLINE float finish_row(const Params& p, const QueryTile& tile, int lane, float max, float sum) {
  const bool none = max == -kInfinity && sum == 0.0f;
  const float lse = none ? -kInfinity : max * to_score(p) + logf(sum);
  const int64_t h = tile.head[lane], row = (tile.b * p.num_heads + h) * p.q_len + tile.q_idx[lane];
  p.lse[row] = lse;
  if (!p.lse_low && !p.sinks) return none ? 0.0f : 1.0f / sum;
  // Beside a large maximum a float has no place for the logarithm of the sum. The score is rounded where the backward
  // rounds it (product_less).
  const float score = max * to_score(p);
  const double exact = static_cast<double>(max) * to_score(p), whole = (FUSES ? exact : score) + log(double{sum});
  const float low = fabsf(lse) < kInfinity ? static_cast<float>(whole - lse) : 0.0f;
  if (p.lse_low) p.lse_low[row] = low;
  return none ? 0.0f : p.sinks ? 1.0f / sum * left_by_sink(p.sinks[h], lse, low) : 1.0f / sum;
}

// out and lse of a finished tile.
static void finish_tile(const Params& p, const QueryTile& tile, const State& state) {
  float factor[BLOCK_M];
  for (int lane = 0; lane < tile.count; ++lane)
    factor[lane] = finish_row(p, tile, lane, state.max[lane], state.sum[lane]);
  write_lanes(p.out, tile, p.head_dim_v, state.out, factor, p.out_low);
}

}  // namespace fastattn::FASTATTN_ISA
