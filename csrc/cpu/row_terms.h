// What the backward pass needs of each query row, from out, d_out, lse and d_lse, and from what rounding took from out
// and lse where the forward has kept it:
//
//   share = exp(lse - log(exp(lse) + exp(sink)))     what the sink leaves of the weights; 1 without sinks
//   shift = d_lse - share * sum(d_out * out)         so that d score = exp(score - lse) * (share * d weight + shift)
//
// The sinks' gradient, and a bias's that is summed, want that sum as the backward's own weights have it: `p_dp_rowsum`,
// the sum over keys of weight * d weight, which the backward pass gathers for them. A sink's gradient is the sum over
// rows of -(1 - share) * p_dp_rowsum.
#pragma once

#include "scores.h"
#include "work.h"

namespace fastattn::FASTATTN_ISA {

constexpr int64_t ROW_BLOCK = 256;

struct RowTerms {
  float *share, *shift;  // [batch, num_heads, q_len]

  explicit RowTerms(const Params& p) : share(p.row_terms), shift(share + p.batch * p.num_heads * p.q_len) {}
};

// What rounding took from the lse of a row; 0 where nobody knows.
INLINE float known_low(const Params& p, int64_t row) {
  const float low = p.lse_low ? p.lse_low[row] : 0.0f;
  return low == low ? low : 0.0f;
}

// sum(d_out * out) of one row, in float.
static float row_product(const Params& p, int64_t b, int64_t h, int64_t i) {
  constexpr int64_t PIECE = 64;
  float left[PIECE], right[PIECE], low[PIECE], sums[PIECE] = {};
  const char *out = row_at(p.out, b, h, i), *d_out = row_at(p.d_out, b, h, i);
  const int64_t out_step = PIECE * p.out.stride[3] * (p.out.dtype == kFloat32 ? 4 : 2);
  const int64_t d_out_step = PIECE * p.d_out.stride[3] * (p.d_out.dtype == kFloat32 ? 4 : 2);
  for (int64_t d = 0; d < p.head_dim_v; d += PIECE, out += out_step, d_out += d_out_step) {
    const int64_t n = p.head_dim_v - d < PIECE ? p.head_dim_v - d : PIECE, width = round_up(n, VL);
    read_row(p.out, out, n, width, left);
    read_row(p.d_out, d_out, n, width, right);
    if (p.out_low.data) {
      read_row(p.out_low, row_at(p.out_low, b, h, i) + d * p.out_low.stride[3] * 2, n, width, low);
      for (int64_t at = 0; at < width; at += VL) store(left + at, load(left + at) + load(low + at));
    }
    for (int64_t at = 0; at < width; at += VL) store(sums + at, load(sums + at) + load(left + at) * load(right + at));
  }
  for (int64_t half = PIECE / 2; half; half /= 2)
    for (int64_t at = 0; at < half; ++at) sums[at] += sums[at + half];
  return sums[0];
}

static void row_block(const Params& p, int64_t b, int64_t h, int64_t first) {
  const RowTerms to(p);
  const int64_t last = first + ROW_BLOCK < p.q_len ? first + ROW_BLOCK : p.q_len;
  for (int64_t i = first; i < last; ++i) {
    const int64_t at = (b * p.num_heads + h) * p.q_len + i;
    if (p.lse[at] == -kInfinity) {
      to.share[at] = to.shift[at] = 0.0f;
      continue;
    }
    const float product = row_product(p, b, h, i), d_lse = p.d_lse ? p.d_lse[at] : 0.0f;
    const float share = p.sinks ? left_by_sink(p.sinks[h], p.lse[at], known_low(p, at)) : 1.0f;
    to.share[at] = share;
    to.shift[at] = d_lse - share * product;
  }
}

static void run_row_terms(const Params& p) {
  const int64_t blocks = (p.q_len + ROW_BLOCK - 1) / ROW_BLOCK;
  run_items(p, p.batch * p.num_heads * blocks, [&](int64_t item, Scratch&) {
    row_block(p, item / blocks / p.num_heads, item / blocks % p.num_heads, item % blocks * ROW_BLOCK);
    return true;
  });
}

// Replace each row's shift by the exact one, and sum the sinks' gradient, a head an item.
static void finish_row_terms(const Params& p, const float* p_dp_rowsum) {
  const RowTerms to(p);
  run_items(p, p.num_heads, [&](int64_t h, Scratch&) {
    double dsink = 0.0;
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t at = (b * p.num_heads + h) * p.q_len, last = at + p.q_len; at < last; ++at) {
        if (p.lse[at] == -kInfinity) continue;
        to.shift[at] = (p.d_lse ? p.d_lse[at] : 0.0f) - to.share[at] * p_dp_rowsum[at];
        const double lse = static_cast<double>(p.lse[at]) + known_low(p, at);
        if (p.sinks) dsink -= static_cast<double>(p_dp_rowsum[at]) / (1.0 + exp(lse - p.sinks[h]));
      }
    if (p.dsinks) p.dsinks[h] = static_cast<float>(dsink);
    return true;
  });
}

}  // namespace fastattn::FASTATTN_ISA
