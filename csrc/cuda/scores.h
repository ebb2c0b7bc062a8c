// From raw products to scores, on the fragments of one warp's rows: soft cap and bias, what the mask hides, dropout.
#pragma once

#include "../common/mask.h"
#include "../common/philox.h"
#include "softmax.h"
#include "walk.h"

namespace fastattn::cuda {

// A thread's two rows.
struct Rows {
  int32_t head[2], q_idx[2];
  bool there[2];
  int32_t batch;

  DEVICE Rows(const ForwardArgs& a, const Place& place, int32_t first) : batch(place.batch) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int2 row = row_of(a, place, first + 8 * r);
      there[r] = is_row(a, place, row);
      head[r] = place.head + (there[r] ? row.x : 0);
      q_idx[r] = there[r] ? row.y : place.q_first;
    }
  }
};

// Keys from `end` on, counted from the thread's first.
template <int N>
DEVICE void hide_beyond(float (&x)[N], int32_t end) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    if (key_of(n) >= end) x[n] = -INFINITY;
  }
}

// `seen`: of each row two intervals, ends counted from key 0; `first`: the thread's first key.
template <int N>
DEVICE void hide_outside(float (&x)[N], const int4 (&seen)[2], bool two, int32_t first) {
  if (two) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int32_t kv_idx = first + key_of(n);
      const int4& in = seen[row_of(n)];
      if (!((kv_idx >= in.x && kv_idx < in.y) || (kv_idx >= in.z && kv_idx < in.w))) x[n] = -INFINITY;
    }
  } else {
    const int32_t low[2] = {seen[0].x - first, seen[1].x - first}, high[2] = {seen[0].y - first, seen[1].y - first};
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (!(key_of(n) >= low[row_of(n)] && key_of(n) < high[row_of(n)])) x[n] = -INFINITY;
    }
  }
}

// What a row sees of a thread's keys through one term: bit m for its m-th key, 8 (m / 2) + m % 2 from `first` on.
template <int KEYS>
DEVICE uint32_t term_bits(const ForwardArgs& a, const MaskTerm& term, int32_t batch, int32_t head, int32_t q_idx,
                          int32_t first) {
  const int64_t at = batch * term.stride[0] + head * term.stride[1] + q_idx * term.stride[2];
  int32_t low = 0, high = 0;
  int64_t id = 0;
  if (term.kind == kInterval) {
    low = term.start[at];
    high = term.stop[at];
  } else if (term.kind == kBand) {
    low = clamp(q_idx + static_cast<int32_t>(term.low), a.kv_len);
    high = clamp(q_idx + static_cast<int32_t>(term.high), a.kv_len);
  } else if (term.kind == kIds) {
    id = term.q_ids[at];
  }
  uint32_t bits = 0;
#pragma unroll 1
  for (int m = 0; m < KEYS; ++m) {
    const int32_t kv_idx = first + 8 * (m / 2) + m % 2;
    if (kv_idx >= a.kv_len) break;
    bool seen = kv_idx >= low && kv_idx < high;
    if (term.kind == kElements)
      seen = term.elements[at + kv_idx * term.stride[3]] != 0;
    else if (term.kind == kIds)
      seen = keep_ids(id, term.kv_ids[batch * term.kv_id_stride[0] + kv_idx * term.kv_id_stride[1]]);
    bits |= static_cast<uint32_t>(seen) << m;
  }
  return bits;
}

constexpr int kStack = 4;  // terms' bits that wait to be joined; the host refuses a program that needs more

template <int N>
DEVICE void hide_by_program(float (&x)[N], const ForwardArgs& a, const Rows& rows, int32_t first) {
  static_assert(N / 2 <= 32, "what a row sees of a thread's keys is one word");
#pragma unroll 1
  for (int r = 0; r < 2; ++r) {
    const int32_t head = r ? rows.head[1] : rows.head[0], q_idx = r ? rows.q_idx[1] : rows.q_idx[0];
    uint32_t stack[kStack] = {};
#pragma unroll 1
    for (int w = 0; w < a.program.words; ++w) {
      const int32_t word = a.program.word[w];
      if (word >= 0) {
        const uint32_t bits = term_bits<N / 2>(a, a.program.term[word], rows.batch, head, q_idx, first);
#pragma unroll
        for (int n = kStack - 1; n > 0; --n) stack[n] = stack[n - 1];
        stack[0] = bits;
      } else {
        stack[0] = word == kAnd ? stack[1] & stack[0] : stack[1] | stack[0];
#pragma unroll
        for (int n = 1; n + 1 < kStack; ++n) stack[n] = stack[n + 1];
      }
    }
    const uint32_t hidden = ~stack[0];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (row_of(n) == r && (hidden >> (n / 4 * 2 + n % 2) & 1)) x[n] = -INFINITY;
    }
  }
}

// By its series near 0, where a quotient of exponentials cancels.
DEVICE float tanh_of(float x) {
  const float square = x * x;
  const float series = fmaf(square, fmaf(square, fmaf(square, 62.0f / 2835, -17.0f / 315), 2.0f / 15), -1.0f / 3);
  const float small = arch::exp2_approx(fabsf(x) * (-2 * kLog2e));
  const float far = (1.0f - small) * arch::reciprocal_approx(1.0f + small);
  return square < 0.0625f ? x * fmaf(square, series, 1.0f) : copysignf(far, x);
}

DEVICE float table_at(const Table& table, int64_t at) {
  if (table.dtype == kFloat32) return static_cast<const float*>(table.data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(table.data)[at];
  return table.dtype == kBFloat16 ? arch::to_float(arch::bf16{bits}) : arch::to_float(arch::f16{bits});
}

// Scale, soft cap, bias: scores in natural units.
template <int N>
DEVICE void finish_scores(float (&x)[N], const ForwardArgs& a, const Rows& rows, int32_t first) {
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] *= a.scale;
  if (a.softcap != 0.0f) {
    const float over = 1.0f / a.softcap;
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] = a.softcap * tanh_of(x[n] * over);
  }
  if (a.bias.data) {
    int64_t at[2];
#pragma unroll
    for (int r = 0; r < 2; ++r)
      at[r] = rows.batch * a.bias.stride[0] + rows.head[r] * a.bias.stride[1] + rows.q_idx[r] * a.bias.stride[2];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int32_t kv_idx = first + key_of(n);
      if (rows.there[row_of(n)] && kv_idx < a.kv_len) {
        const float bias = table_at(a.bias, at[row_of(n)] + kv_idx * a.bias.stride[3]);
        x[n] = bias == -INFINITY ? bias : x[n] + bias;  // it hides like a mask, whatever the product is
      }
    }
  }
}

// Philox4x32-10: four random words of a counter.
DEVICE uint4 philox(uint4 c, uint64_t seed) {
  constexpr uint32_t step[2] = {kPhiloxStep[0], kPhiloxStep[1]};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t high0 = __umulhi(kPhiloxMultiplier[0], c.x), high1 = __umulhi(kPhiloxMultiplier[1], c.z);
    const uint32_t low0 = kPhiloxMultiplier[0] * c.x, low1 = kPhiloxMultiplier[1] * c.z;
    c = make_uint4(high1 ^ c.y ^ key[0], low1, high0 ^ c.w ^ key[1], low0);
    key[0] += step[0];
    key[1] += step[1];
  }
  return c;
}

// Weights that dropout takes are 0 afterwards; the others keep their size until the end.
template <int N>
DEVICE void drop(float (&x)[N], const ForwardArgs& a, const Rows& rows, int32_t first) {
  static_assert(N / 2 <= 32, "what a row keeps of a thread's keys is one word");
  const uint64_t seed = static_cast<uint64_t>(*a.seed);
#pragma unroll 1
  for (int r = 0; r < 2; ++r) {
    const int32_t head = r ? rows.head[1] : rows.head[0], q_idx = r ? rows.q_idx[1] : rows.q_idx[0];
    uint32_t dropped = a.drops_all ? ~0u : 0u;
#pragma unroll 1
    for (int pair = 0; pair < N / 4; ++pair) {  // of neighbouring keys, which have one counter
      const int32_t kv_idx = first + 8 * pair;
      const uint4 words = philox(make_uint4(kv_idx / 4, q_idx, head, rows.batch), seed);
      const bool upper = kv_idx & 2;
      dropped |= static_cast<uint32_t>((upper ? words.z : words.x) < a.drop_below) << (2 * pair);
      dropped |= static_cast<uint32_t>((upper ? words.w : words.y) < a.drop_below) << (2 * pair + 1);
    }
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (row_of(n) == r && (dropped >> (n / 4 * 2 + n % 2) & 1)) x[n] = 0.0f;
  }
}

}  // namespace fastattn::cuda
