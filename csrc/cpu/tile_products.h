// The matrix products (products.h) on AMX tiles: pairs of bfloat16, 32 x 32 of c in four tiles over all of k. Operands
// are read a tile at a time, so `a` has its steps side by side.
#pragma once

#include "amx.h"

namespace fastattn::FASTATTN_ISA {

// 2 x 2 tiles of c; strides in words.
template <bool ADD>
INLINE void tile_block(int64_t steps, const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_step, float* c,
                       int64_t c_row) {
  float* below = c + TILE_ROWS * c_row;
  if (ADD) {
    load_tile<0>(c, c_row * 4);
    load_tile<1>(c + TILE_WORDS, c_row * 4);
    load_tile<2>(below, c_row * 4);
    load_tile<3>(below + TILE_WORDS, c_row * 4);
  } else {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
  }
  for (int64_t k = 0; k < steps; k += TILE_WORDS) {
    load_tile<4>(a + k, a_row * 4);
    load_tile<6>(b + k * b_step, b_step * 4);
    multiply_tiles<0, 4, 6>();
    load_tile<7>(b + k * b_step + TILE_WORDS, b_step * 4);
    multiply_tiles<1, 4, 7>();
    load_tile<5>(a + TILE_ROWS * a_row + k, a_row * 4);
    multiply_tiles<2, 5, 6>();
    multiply_tiles<3, 5, 7>();
  }
  store_tile<0>(c, c_row * 4);
  store_tile<1>(c + TILE_WORDS, c_row * 4);
  store_tile<2>(below, c_row * 4);
  store_tile<3>(below + TILE_WORDS, c_row * 4);
}

static_assert(BLOCK_M == 2 * TILE_WORDS, "a tile of queries is a block's columns");

template <bool ADD>
static void tile_lane_product(int64_t rows, int64_t steps, const uint32_t* a, int64_t a_row, const uint32_t* b,
                              float* c) {
  for (int64_t r = 0; r < rows; r += 2 * TILE_ROWS)
    tile_block<ADD>(steps, a + r * a_row, a_row, b, BLOCK_M, c + r * BLOCK_M, BLOCK_M);
}

static void tile_column_product(int64_t rows, int64_t width, int64_t steps, const uint32_t* a, int64_t a_row,
                                const uint32_t* b, float* c) {
  for (int64_t n = 0; n < width; n += 2 * TILE_WORDS)
    for (int64_t r = 0; r < rows; r += 2 * TILE_ROWS)
      tile_block<true>(steps, a + r * a_row, a_row, b + n, width, c + r * width + n, width);
}

}  // namespace fastattn::FASTATTN_ISA
