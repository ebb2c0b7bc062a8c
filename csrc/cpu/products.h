// The matrix products, on packed operands in cache. One signature, a dot product ("Dot") per element type:
//
//   c[r][n] (+)= sum over k of a(r, k) * b[k][n]        a(r, k) = a[r * a_row + k * a_step]
//
// `a` is broadcast element by element, `b` and `c` are vectors along n. A Word is what one step multiplies: a float, or
// two half-precision numbers side by side (k runs over pairs then).
#pragma once

#if defined(FASTATTN_AMX)
#include "tile_products.h"
#else
#include "vec.h"
#endif

namespace fastattn::FASTATTN_ISA {

struct FloatDot {
  using Word = float;
  static constexpr int PER_WORD = 1, STEPS = 1;  // numbers a word, and words that go together
  using Vector = vf;
  static INLINE vf madd(vf sum, Vector b, Word a) { return sum + b * a; }
};

#if defined(__AVX512BF16__)
struct BFloat16Dot {
  using Word = uint32_t;
  static constexpr int PER_WORD = 2, STEPS = 1;
  using Vector = vi;
  static INLINE vf madd(vf sum, Vector b, Word a) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)));
  }
  // Rounded and side by side: `even` in the low half of each word.
  static INLINE vi pair(vf even, vf odd) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    alignas(64) static constexpr uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (vi)_mm512_permutexvar_epi16(_mm512_load_si512(ORDER), both);
  }
  static INLINE void store_rounded(void* to, vf numbers) {
    const __m256bh half = _mm512_cvtneps_pbh((__m512)numbers);
    std::memcpy(to, &half, sizeof half);
  }
};
#endif

#if defined(FASTATTN_AMX)
struct TileDot : BFloat16Dot {
  static constexpr int STEPS = TILE_WORDS;
};
template <class Dot>
constexpr bool IS_TILED = false;
template <>
constexpr bool IS_TILED<TileDot> = true;

template <class Dot, bool ADD>
static void lane_product(int, int64_t rows, int64_t steps, const typename Dot::Word* a, int64_t a_row, int64_t,
                         const typename Dot::Word* b, float* c) {
  tile_lane_product<ADD>(rows, steps, a, a_row, b, c);
}

template <class Dot>
static void column_product(int64_t rows, int64_t width, int64_t steps, const typename Dot::Word* a, int64_t a_row,
                           const typename Dot::Word* b, float* c) {
  tile_column_product(rows, width, steps, a, a_row, b, c);
}
#else
template <class Dot>
constexpr bool IS_TILED = false;

// ROWS x VECTORS of c in registers over all of k. What is added to comes last: small terms are summed before they meet
// a sum beside which each of them would vanish.
template <class Dot, int ROWS, int VECTORS, bool ADD>
INLINE void product_block(int64_t steps, const typename Dot::Word* a, int64_t a_row, int64_t a_step,
                          const typename Dot::Word* b, int64_t b_step, float* c, int64_t c_row) {
  vf sum[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = vf{};
  for (int64_t k = 0; k < steps; ++k) {
    typename Dot::Vector line[VECTORS];
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) line[v] = load<typename Dot::Vector>(b + k * b_step + v * VL);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const typename Dot::Word factor = a[r * a_row + k * a_step];
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = Dot::madd(sum[r][v], line[v], factor);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) {
      float* to = c + r * c_row + v * VL;
      store(to, ADD ? load(to) + sum[r][v] : sum[r][v]);
    }
}

template <class Dot, int VECTORS, bool ADD>
static void lane_strip(int64_t rows, int64_t steps, const typename Dot::Word* a, int64_t a_row, int64_t a_step,
                       const typename Dot::Word* b, float* c) {
  for (int64_t r = 0; r < rows; r += LANE_ROWS)
    product_block<Dot, LANE_ROWS, VECTORS, ADD>(steps, a + r * a_row, a_row, a_step, b, BLOCK_M, c + r * BLOCK_M,
                                                BLOCK_M);
}

// Columns are the queries of a tile, in `vectors` vectors: b [steps][BLOCK_M], c [rows][BLOCK_M]; rows a multiple of
// LANE_ROWS.
template <class Dot, bool ADD>
static void lane_product(int vectors, int64_t rows, int64_t steps, const typename Dot::Word* a, int64_t a_row,
                         int64_t a_step, const typename Dot::Word* b, float* c) {
  int n = 0;
  for (; n + LANE_VECTORS <= vectors; n += LANE_VECTORS)
    lane_strip<Dot, LANE_VECTORS, ADD>(rows, steps, a, a_row, a_step, b + n * VL, c + n * VL);
  for (; n < vectors; ++n) lane_strip<Dot, 1, ADD>(rows, steps, a, a_row, a_step, b + n * VL, c + n * VL);
}

// Columns are head dimensions: b [steps][width], c [rows][width], added to; width a multiple of VL.
template <class Dot>
static void column_product(int64_t rows, int64_t width, int64_t steps, const typename Dot::Word* a, int64_t a_row,
                           const typename Dot::Word* b, float* c) {
  int64_t n = 0;
  for (; n + COLUMN_VECTORS * VL <= width; n += COLUMN_VECTORS * VL)
    for (int64_t r = 0; r < rows; r += COLUMN_ROWS)
      product_block<Dot, COLUMN_ROWS, COLUMN_VECTORS, true>(steps, a + r * a_row, a_row, 1, b + n, width,
                                                            c + r * width + n, width);
  for (; n < width; n += VL)
    for (int64_t r = 0; r < rows; r += LANE_ROWS)
      product_block<Dot, LANE_ROWS, 1, true>(steps, a + r * a_row, a_row, 1, b + n, width, c + r * width + n, width);
}
#endif

}  // namespace fastattn::FASTATTN_ISA
