// The two products of a few query rows with bfloat16 keys and values, on instructions that multiply pairs of them.
#pragma once

#include "decode_rows.h"

namespace fastattn::FASTATTN_ISA {

constexpr int PAIRED = 2 * VL;  // numbers a vector

// Where number d of an output row lies: interleaving two rows takes four numbers of every eight first, then the others.
INLINE int64_t paired_place(int64_t d) {
  const int64_t in = d % PAIRED;
  return d - in + in % 8 / 4 * VL + in / 8 * 4 + in % 4;
}

#if defined(__AVX512BF16__)

struct ReadBFloat16Pairs {
  static constexpr int BYTES = 2;
};

// sum[j][r] = sum over d of key[j][d] * query[r][d], lanes not added up; query [ROWS][width] bfloat16.
template <int ROWS, int KEYS>
INLINE void paired_sums(const char* key, int64_t key_bytes, int64_t dim, const uint16_t* query, int64_t width,
                        vf (&sum)[KEYS][ROWS]) {
  for (int64_t d = 0; d < dim; d += PAIRED) {
    __m512bh row[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) row[r] = load<__m512bh>(query + r * width + d);
#pragma GCC unroll 16
    for (int j = 0; j < KEYS; ++j) {
      const __m512bh line = load<__m512bh>(key + j * key_bytes + d * 2);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sum[j][r] = (vf)_mm512_dpbf16_ps((__m512)sum[j][r], line, row[r]);
    }
  }
}

// Weights [BLOCK_N][ROWS] -> [BLOCK_N / 2][ROWS] words of two keys.
template <int ROWS>
INLINE void row_pairs(const float* weights, uint32_t* to) {
  struct Order {
    uint16_t at[PAIRED];
  };
  // Word w of a vector is row w % ROWS of the pair w / ROWS.
  static constexpr Order ORDER = [] {
    Order order{};
    for (int w = 0; w < VL; ++w)
      for (int odd = 0; odd < 2; ++odd)
        order.at[2 * w + odd] = static_cast<uint16_t>((2 * (w / ROWS) + odd) * ROWS + w % ROWS);
    return order;
  }();
  const __m512i order = load<__m512i>(ORDER.at);
#pragma GCC unroll 2
  for (int at = 0; at < BLOCK_N * ROWS; at += PAIRED) {
    const __m512bh both = _mm512_cvtne2ps_pbh(load<__m512>(weights + at + VL), load<__m512>(weights + at));
    store(to + at / 2, _mm512_permutexvar_epi16(order, (__m512i)both));
  }
}

// out[r][paired_place(d)] += sum over j of weights[j][r] * value[j][d], for VECTORS * PAIRED numbers d and the keys
// with a bit in `seen`; weights [BLOCK_N / 2][ROWS] are pairs of keys. `ahead` bytes of later rows are fetched.
template <int ROWS, int VECTORS>
INLINE void paired_output(const char* value, int64_t value_bytes, uint64_t seen, const uint32_t* weights, float* out,
                          int64_t width, int64_t ahead) {
  __m512 sum[ROWS][VECTORS][2];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < 2 * VECTORS; ++v) sum[r][v / 2][v % 2] = load<__m512>(out + r * width + v * VL);
  for (int j = 0; seen; j += 2, seen >>= 2) {
    if (!(seen & 3)) continue;
    const char* row = value + j * value_bytes;
    fetch(row + AHEAD * value_bytes, ahead);
    fetch(row + (AHEAD + 1) * value_bytes, ahead);
    __m512i words[VECTORS][2];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      const __m512i even = seen & 1 ? load<__m512i>(row + v * PAIRED * 2) : _mm512_setzero_si512();
      const __m512i odd = seen & 2 ? load<__m512i>(row + value_bytes + v * PAIRED * 2) : _mm512_setzero_si512();
      words[v][0] = _mm512_unpacklo_epi16(even, odd);
      words[v][1] = _mm512_unpackhi_epi16(even, odd);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const __m512bh weight = (__m512bh)_mm512_set1_epi32(static_cast<int>(weights[j / 2 * ROWS + r]));
#pragma GCC unroll 8
      for (int v = 0; v < 2 * VECTORS; ++v)
        sum[r][v / 2][v % 2] = _mm512_dpbf16_ps(sum[r][v / 2][v % 2], (__m512bh)words[v / 2][v % 2], weight);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < 2 * VECTORS; ++v) store(out + r * width + v * VL, sum[r][v / 2][v % 2]);
}

#endif

}  // namespace fastattn::FASTATTN_ISA
