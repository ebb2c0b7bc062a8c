// The matrix products, on packed operands in cache. One signature, a dot product ("Dot") per element type:
//
//   c[r][n] (+)= sum over k of a(r, k) * b[k][n]        a(r, k) = a[r * a_row + k * a_step]
//
// `a` is broadcast element by element, `b` and `c` are vectors along n. A Word is what one step multiplies: a float, or
// two half-precision numbers side by side (k runs over pairs then).
#pragma once

#include "vec.h"

namespace fastattn::FASTATTN_ISA {

struct FloatDot {
  using Word = float;
  static constexpr int PER_WORD = 1;
  using Vector = vf;
  static INLINE vf madd(vf sum, Vector b, Word a) { return sum + b * a; }
};

#if defined(__AVX512BF16__)
struct BFloat16Dot {
  using Word = uint32_t;
  static constexpr int PER_WORD = 2;
  using Vector = vi;
  static INLINE vf madd(vf sum, Vector b, Word a) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)));
  }
};
#endif

// ROWS x VECTORS_ of c in registers over all of k.
template <class Dot, int ROWS, int VECTORS_, bool ADD>
INLINE void product_block(int64_t steps, const typename Dot::Word* a, int64_t a_row, int64_t a_step,
                          const typename Dot::Word* b, int64_t b_step, float* c, int64_t c_row) {
  vf sum[ROWS][VECTORS_];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS_; ++v) sum[r][v] = ADD ? load(c + r * c_row + v * VL) : vf{};
  for (int64_t k = 0; k < steps; ++k) {
    typename Dot::Vector line[VECTORS_];
    for (int v = 0; v < VECTORS_; ++v) line[v] = load<typename Dot::Vector>(b + k * b_step + v * VL);
    for (int r = 0; r < ROWS; ++r) {
      const typename Dot::Word factor = a[r * a_row + k * a_step];
      for (int v = 0; v < VECTORS_; ++v) sum[r][v] = Dot::madd(sum[r][v], line[v], factor);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS_; ++v) store(c + r * c_row + v * VL, sum[r][v]);
}

// Columns are the BLOCK_M queries of a tile: b [steps][BLOCK_M], c [rows][BLOCK_M]; rows a multiple of LANE_ROWS.
template <class Dot, bool ADD>
static void lane_product(int64_t rows, int64_t steps, const typename Dot::Word* a, int64_t a_row, int64_t a_step,
                         const typename Dot::Word* b, float* c) {
  constexpr int WIDTH = LANE_VECTORS * VL;
  static_assert(BLOCK_M % WIDTH == 0, "a tile of queries is whole groups of vectors");
  for (int n = 0; n < BLOCK_M; n += WIDTH)
    for (int64_t r = 0; r < rows; r += LANE_ROWS)
      product_block<Dot, LANE_ROWS, LANE_VECTORS, ADD>(steps, a + r * a_row, a_row, a_step, b + n, BLOCK_M,
                                                       c + r * BLOCK_M + n, BLOCK_M);
}

// Columns are head dimensions: b [steps][width], c [BLOCK_N][width], added to; width a multiple of VL.
template <class Dot>
static void column_product(int64_t width, int64_t steps, const typename Dot::Word* a, int64_t a_row,
                           const typename Dot::Word* b, float* c) {
  int64_t n = 0;
  for (; n + COLUMN_VECTORS * VL <= width; n += COLUMN_VECTORS * VL)
    for (int r = 0; r < BLOCK_N; r += COLUMN_ROWS)
      product_block<Dot, COLUMN_ROWS, COLUMN_VECTORS, true>(steps, a + r * a_row, a_row, 1, b + n, width,
                                                            c + r * width + n, width);
  for (; n < width; n += VL)
    for (int r = 0; r < BLOCK_N; r += LANE_ROWS)
      product_block<Dot, LANE_ROWS, 1, true>(steps, a + r * a_row, a_row, 1, b + n, width, c + r * width + n, width);
}

}  // namespace fastattn::FASTATTN_ISA
