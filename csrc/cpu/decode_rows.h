// A few query rows over tiles of keys: their running softmax. Numbers of pairs lie side by side, [keys][ROWS], so that
// a vector holds several keys.
#pragma once

#include "state.h"

namespace fastattn::FASTATTN_ISA {

constexpr int MOST_ROWS = 8;

// The running result of ROWS rows (State, with rows for lanes).
struct RowState {
  float *max, *sum, *out;  // [MOST_ROWS], [MOST_ROWS], [MOST_ROWS][width]

  static int64_t size(const Params& p) { return MOST_ROWS * (2 + padded(p.head_dim_v)); }

  explicit RowState(float* at) : max(at), sum(at + MOST_ROWS), out(at + 2 * MOST_ROWS) {}
  void clear(const Params& p) {
    for (int r = 0; r < MOST_ROWS; ++r) max[r] = -kInfinity;
    std::memset(sum, 0, (size(p) - MOST_ROWS) * sizeof(float));
  }
  void scale(int r, float factor, int64_t width) const {
    sum[r] *= factor;
    for (int64_t d = r * width; d < (r + 1) * width; d += VL) store(out + d, load(out + d) * factor);
  }
  // Raise a row's maximum; returns what to subtract before multiplying by `factor`.
  float raise(int r, float found, float factor, int64_t width) {
    const float before = max[r], now = found > before ? found : before, shift = now == -kInfinity ? 0.0f : now;
    max[r] = now;
    if (now != before && before != -kInfinity) scale(r, exp2f((before - shift) * factor), width);
    return shift;
  }
  // Take in what another part of the keys gave.
  void join(const RowState& part, int rows, float factor, int64_t width) {
    for (int r = 0; r < rows; ++r) {
      const float shift = raise(r, part.max[r], factor, width), weight = exp2f((part.max[r] - shift) * factor);
      sum[r] += part.sum[r] * weight;
      for (int64_t d = r * width; d < (r + 1) * width; d += VL)
        store(out + d, load(out + d) + load(part.out + d) * weight);
    }
  }
};

// What pairs hold -> weights in place, with the running maximum and sum: `online_softmax_step` for numbers side by
// side.
template <int ROWS>
INLINE void online_softmax_step_rows(float* s, float factor, RowState& state, int64_t width) {
  constexpr int NUMBERS = BLOCK_N * ROWS, TURN = ROWS > VL ? ROWS : VL;  // lane n of a turn is row n % ROWS
  alignas(64) float found[TURN], shift[TURN];
  for (int n = 0; n < TURN; n += VL) {
    vf most = splat(-kInfinity);
    for (int at = n; at < NUMBERS; at += TURN) most = larger(most, load(s + at));
    store(found + n, most);
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int n = r + ROWS; n < TURN; n += ROWS) found[r] = found[n] > found[r] ? found[n] : found[r];
    const float base = state.raise(r, found[r], factor, width);
    for (int n = r; n < TURN; n += ROWS) shift[n] = base;
  }
  for (int n = 0; n < TURN; n += VL) {
    const vf base = load(shift + n);
    vf sum = vf{};
    for (int at = n; at < NUMBERS; at += TURN) {
      const vf weight = exp2((load(s + at) - base) * factor);
      sum = sum + weight;
      store(s + at, weight);
    }
    store(found + n, sum);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int n = r; n < TURN; n += ROWS) state.sum[r] += found[n];
}

// Between numbers side by side and the lanes of a tile, [BLOCK_N][BLOCK_M].
template <int ROWS>
INLINE void to_lanes(const float* from, float* to) {
  for (int j = 0; j < BLOCK_N; ++j) std::memcpy(to + j * BLOCK_M, from + j * ROWS, ROWS * sizeof(float));
}

template <int ROWS>
INLINE void from_lanes(const float* from, float* to) {
  for (int j = 0; j < BLOCK_N; ++j) std::memcpy(to + j * ROWS, from + j * BLOCK_M, ROWS * sizeof(float));
}

// Lane n is the sum of the lanes of sums[n].
INLINE vf totals(const vf* sums) {
#if defined(__AVX512F__)
  // Each round adds the halves of two vectors into one: 16, 8, 4, 2 vectors with 1, 2, 4, 8 sums in each. The order
  // they start in is the one that the rounds undo.
  constexpr int ORDER[VL] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};
  __m512 at[VL];
#pragma GCC unroll 16
  for (int n = 0; n < VL; ++n) at[n] = (__m512)sums[ORDER[n]];
#pragma GCC unroll 16
  for (int n = 0; n < 8; ++n)
    at[n] = _mm512_add_ps(_mm512_shuffle_f32x4(at[n], at[n + 8], 0x44), _mm512_shuffle_f32x4(at[n], at[n + 8], 0xee));
#pragma GCC unroll 16
  for (int n = 0; n < 4; ++n)
    at[n] = _mm512_add_ps(_mm512_shuffle_f32x4(at[n], at[n + 4], 0x88), _mm512_shuffle_f32x4(at[n], at[n + 4], 0xdd));
#pragma GCC unroll 16
  for (int n = 0; n < 2; ++n)
    at[n] = _mm512_add_ps(_mm512_shuffle_ps(at[n], at[n + 2], 0x44), _mm512_shuffle_ps(at[n], at[n + 2], 0xee));
  return (vf)_mm512_add_ps(_mm512_shuffle_ps(at[0], at[1], 0x88), _mm512_shuffle_ps(at[0], at[1], 0xdd));
#else
  vf found = vf{};
  for (int n = 0; n < VL; ++n) {
    float lanes[VL];
    store(lanes, sums[n]);
#pragma GCC unroll 8
    for (int half = VL / 2; half; half /= 2)
#pragma GCC unroll 8
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    found[n] = lanes[0];
  }
  return found;
#endif
}

}  // namespace fastattn::FASTATTN_ISA
