// The running softmax of a warpgroup's rows (Milakov and Gimelshein 2018), on the fragments that wgmma leaves.
#pragma once

#include "args.h"

namespace fastattn::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLargest = 3.4028234e38f;  // of float
constexpr float kLargestPower = 3e38f;     // of two, that a score may be: what rounds it leaves it finite

// Element n of a thread's scores: which of its two rows, and which key, counted from the thread's own first one.
__host__ __device__ constexpr int row_of(int n) { return n / 2 % 2; }
__host__ __device__ constexpr int key_of(int n) { return 8 * (n / 4) + n % 2; }

constexpr float kSlack = 8.0f;  // powers of two that a running maximum may lag behind: weights stay below 2^8

// 2^x on the FMA pipes (Cody and Waite 1980: a whole part for the exponent's bits, a polynomial for the rest), relative
// error 3e-6; for x below 128. Where 2^x is no normal number it is 0; of NaN it is NaN, whose bits no shift may touch.
DEVICE float exp2_poly(float x) {
  const float bounded = arch::max_nan(x, -127.0f);  // whose exponent's bits are 0
  const float shifted = bounded + 12582912.0f;      // 1.5 * 2^23: the whole part stands in the low bits
  const float f = bounded - (shifted - 12582912.0f);
  float y = fmaf(f, 0.00958284f, 0.05590641f);
  y = fmaf(f, y, 0.24024099f);
  y = fmaf(f, y, 0.69312419f);
  y = fmaf(f, y, 1.0f);
  return y * __uint_as_float((__float_as_uint(shifted) << 23) + (127u << 23));
}

// Of a thread's two rows, each shared with the three other threads of its quad.
struct Softmax {
  float most[2];  // the running maximum, in the scores' units; weights are relative to it
  float sum[2];   // of the thread's own weights

  DEVICE void clear() {
    most[0] = most[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }

  // Scores to weights, in place; NATURAL: their factor is log2(e), and they may be of any size. Those below `lowest`
  // weigh 0. `rescale` gets what was accumulated before has to be multiplied by; false: by 1, in every row of the warp.
  // The maximum stays behind while it rises by little: that saves the multiplication.
  template <int POLY_EVERY, bool NATURAL, int N>
  DEVICE bool step(float (&x)[N], float factor, float lowest, float (&rescale)[2]) {
    float top[2];
    find_tops(x, top);
    bool grows = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool rises = !((top[r] - most[r]) * factor <= kSlack);  // true where nothing has been seen yet
      const float reference = rises ? fmaxf(top[r], most[r]) : most[r];
      const float base = fmaxf(reference, lowest);
      rescale[r] = arch::exp2_approx((most[r] - base) * factor);
      grows |= rises;
      most[r] = reference;
      // A multiply-add of scores of any size would leave the product's rounding error: those are subtracted first.
      const float shift = NATURAL ? 0.0f : base * factor;
      float added = 0.0f;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (row_of(n) != r) continue;
        const float power = fmaf(NATURAL ? x[n] - base : x[n], factor, -shift);
        const bool poly = POLY_EVERY != 0 && n / 4 % (POLY_EVERY ? POLY_EVERY : 1) == 0;
        x[n] = poly ? exp2_poly(power) : arch::exp2_approx(power);
        added += x[n];
      }
      sum[r] = fmaf(sum[r], rescale[r], added);
    }
    return __any_sync(~0u, grows);
  }

  // The rows' largest scores. Four chains side by side, as each link of one waits for the link before.
  template <int N>
  static DEVICE void find_tops(const float (&x)[N], float (&top)[2]) {
    float other[2] = {x[4], x[6]};
    top[0] = x[0];
    top[1] = x[2];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float& chain = n / 4 % 2 ? other[row_of(n)] : top[row_of(n)];
      chain = fmaxf(chain, x[n]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) top[r] = fmaxf(top[r], other[r]);
#pragma unroll
    for (int step = 1; step < 4; step *= 2)
#pragma unroll
      for (int r = 0; r < 2; ++r) top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], step));
  }

  // Sums over the quads.
  DEVICE void gather() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    }
  }

  // Whether a row's largest score is above the range: its weights are NaN, and its lse inf.
  template <bool NATURAL>
  DEVICE bool overflows(int r, float factor) const {
    return (NATURAL ? most[r] : most[r] * factor) == INFINITY;
  }

  // The natural logarithm of what a row sees; -inf where that is nothing.
  template <bool NATURAL>
  DEVICE float lse(int r, float factor) const {
    if (overflows<NATURAL>(r, factor)) return INFINITY;
    if (sum[r] == 0.0f) return -INFINITY;
    const float log2_sum = arch::log2_approx(sum[r]);
    return NATURAL ? most[r] + log2_sum * kLn2 : fmaf(most[r], factor, log2_sum) * kLn2;
  }

  // What a row's accumulated values are multiplied by; a sink is one more logit in the denominator.
  template <bool NATURAL>
  DEVICE float weight(int r, float factor, const float* sink) const {
    if (overflows<NATURAL>(r, factor)) return NAN;
    if (sum[r] == 0.0f) return 0.0f;
    float total = sum[r];
    if (sink) total += arch::exp2_approx(NATURAL ? (*sink - most[r]) * kLog2e : fmaf(-most[r], factor, *sink * kLog2e));
    return 1.0f / total;
  }
};

}  // namespace fastattn::cuda
