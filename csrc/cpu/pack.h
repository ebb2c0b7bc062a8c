// From tensors of any strides into the layouts that the products read, and back. A tile's rows come in three forms:
//
//   along:   [rows][words]              its own rows; a product sums over the head dimension, rows are broadcast
//   across:  [words][BLOCK_M]           transposed; a product sums over the head dimension, rows are the lanes
//   pairs:   [rows / PER_WORD][width]   a product sums over the rows
//
// `along` is memory as it is; with floats `pairs` is too.
#pragma once

#include "half.h"
#include "products.h"

namespace fastattn::FASTATTN_ISA {

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

constexpr int AHEAD = 32;  // rows to fetch ahead of use where memory is read as it lies

// Bring a row into the second-level cache; past the end of memory this does nothing.
INLINE void fetch(const char* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}

INLINE const char* row_at(const Table& table, int64_t b, int64_t h, int64_t i) {
  if (table.blocks) {
    const int64_t block = table.blocks[b * table.blocks_stride + i / table.block_size];
    b = block < 0 ? 0 : block < table.block_count ? block : table.block_count - 1;
    i %= table.block_size;
  }
  const int64_t at = b * table.stride[0] + h * table.stride[1] + i * table.stride[2];
  return static_cast<const char*>(table.data) + at * (table.dtype == kFloat32 ? 4 : 2);
}

template <class Read>
INLINE int64_t read_vectors(const char* from, int64_t n, float* to) {
  int64_t d = 0;
  for (; d + VL <= n; d += VL) store(to + d, Read::read(from + d * Read::BYTES));
  return d;
}

// n numbers as float, the rest up to `width` zero.
static void read_row(const Table& table, const char* from, int64_t n, int64_t width, float* to) {
  const int64_t step = table.stride[3];
  int64_t d = 0;
  if (table.dtype == kFloat32) {
    const float* row = reinterpret_cast<const float*>(from);
    if (step == 1) d = read_vectors<ReadFloat>(from, n, to);
    for (; d < n; ++d) to[d] = row[d * step];
  } else {
    const uint16_t* row = reinterpret_cast<const uint16_t*>(from);
    if (step == 1)
      d = table.dtype == kBFloat16 ? read_vectors<ReadBFloat16>(from, n, to) : read_vectors<ReadFloat16>(from, n, to);
    for (; d < n; ++d) to[d] = to_float(row[d * step], table.dtype);
  }
  for (; d < width; ++d) to[d] = 0.0f;
}

// The same as raw half-precision bits.
INLINE void read_row(const Table& table, const char* from, int64_t n, int64_t width, uint16_t* to) {
  const uint16_t* row = reinterpret_cast<const uint16_t*>(from);
  const int64_t step = table.stride[3];
  if (step == 1)
    std::memcpy(to, row, n * 2);
  else
    for (int64_t d = 0; d < n; ++d) to[d] = row[d * step];
  for (int64_t d = n; d < width; ++d) to[d] = 0;
}

// Columns [first, first + n) of a row.
static void write_row(const Table& table, int64_t b, int64_t h, int64_t i, int64_t first, int64_t n,
                      const float* from) {
  const int64_t step = table.stride[3];
  char* at = const_cast<char*>(row_at(table, b, h, i)) + first * step * (table.dtype == kFloat32 ? 4 : 2);
  int64_t d = 0;
  if (table.dtype == kFloat32) {
    float* row = reinterpret_cast<float*>(at);
    if (step == 1)
      for (; d + VL <= n; d += VL) store(row + d, load(from + d));
    for (; d < n; ++d) row[d * step] = from[d];
  } else {
    uint16_t* row = reinterpret_cast<uint16_t*>(at);
    if (step == 1)
      for (; d + VL <= n; d += VL)
        store(row + d, table.dtype == kBFloat16 ? to_bfloat16(load(from + d)) : to_float16(load(from + d)));
    for (; d < n; ++d) row[d * step] = from_float(from[d], table.dtype);
  }
}

// What rounding to `table` took from the numbers that write_row has written there, to `low`, if it is there. Half
// dtypes.
INLINE void write_low(const Table& low, const Table& table, int64_t b, int64_t h, int64_t i, int64_t first, int64_t n,
                      const float* from) {
  if (!low.data) return;
  const uint16_t* row = reinterpret_cast<const uint16_t*>(row_at(table, b, h, i)) + first * table.stride[3];
  uint16_t* to = reinterpret_cast<uint16_t*>(const_cast<char*>(row_at(low, b, h, i))) + first * low.stride[3];
  int64_t d = 0;
  if (table.stride[3] == 1 && low.stride[3] == 1)
    for (; d + VL <= n; d += VL) {
      const char* at = reinterpret_cast<const char*>(row + d);
      if (table.dtype == kBFloat16)
        store(to + d, to_bfloat16(load(from + d) - ReadBFloat16::read(at)));
      else
        store(to + d, to_float16(load(from + d) - ReadFloat16::read(at)));
    }
  for (; d < n; ++d)
    to[d * low.stride[3]] = from_float(from[d] - to_float(row[d * table.stride[3]], table.dtype), table.dtype);
}

#if defined(__AVX512F__)
// to[c][r] = from[r][c], 16 x 16 words: each round exchanges halves, ever smaller ones.
INLINE void transpose_block(const float* from, int64_t from_row, float* to, int64_t to_row) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_ps(from + (r & 3 | (r & 4) << 1 | (r & 8) >> 1) * from_row);
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    b[r] = _mm512_shuffle_f32x4(a[r], a[r + 8], 0x44);
    b[r + 8] = _mm512_shuffle_f32x4(a[r], a[r + 8], 0xee);
  }
#pragma GCC unroll 8
  for (int n = 0; n < 8; ++n) {
    const int r = n / 4 * 8 + n % 4;
    a[r] = _mm512_shuffle_f32x4(b[r], b[r + 4], 0x88);
    a[r + 4] = _mm512_shuffle_f32x4(b[r], b[r + 4], 0xdd);
  }
  // a[4 * c + r] holds rows r, r + 4, r + 8, r + 12 of columns 4 c ... 4 c + 3, in that order for the order they came
  // in.
#pragma GCC unroll 4
  for (int c = 0; c < 16; c += 4) {
    const __m512 low0 = _mm512_unpacklo_ps(a[c], a[c + 1]), high0 = _mm512_unpackhi_ps(a[c], a[c + 1]);
    const __m512 low1 = _mm512_unpacklo_ps(a[c + 2], a[c + 3]), high1 = _mm512_unpackhi_ps(a[c + 2], a[c + 3]);
    _mm512_storeu_ps(to + c * to_row, _mm512_shuffle_ps(low0, low1, 0x44));
    _mm512_storeu_ps(to + (c + 1) * to_row, _mm512_shuffle_ps(low0, low1, 0xee));
    _mm512_storeu_ps(to + (c + 2) * to_row, _mm512_shuffle_ps(high0, high1, 0x44));
    _mm512_storeu_ps(to + (c + 3) * to_row, _mm512_shuffle_ps(high0, high1, 0xee));
  }
}
constexpr int TRANSPOSED = 16;
#elif defined(__SSE__)
INLINE void transpose_block(const float* from, int64_t from_row, float* to, int64_t to_row) {
  __m128 w0 = _mm_loadu_ps(from), w1 = _mm_loadu_ps(from + from_row), w2 = _mm_loadu_ps(from + 2 * from_row),
         w3 = _mm_loadu_ps(from + 3 * from_row);
  _MM_TRANSPOSE4_PS(w0, w1, w2, w3);
  _mm_storeu_ps(to, w0);
  _mm_storeu_ps(to + to_row, w1);
  _mm_storeu_ps(to + 2 * to_row, w2);
  _mm_storeu_ps(to + 3 * to_row, w3);
}
constexpr int TRANSPOSED = 4;
#else
INLINE void transpose_block(const float* from, int64_t, float* to, int64_t) { std::memcpy(to, from, 4); }
constexpr int TRANSPOSED = 1;
#endif

// to[c][r] = from[r][c], words of four bytes.
static void transpose(const void* from_words, int64_t from_row, int64_t rows, int64_t columns, void* to_words,
                      int64_t to_row) {
  const float* from = static_cast<const float*>(from_words);
  float* to = static_cast<float*>(to_words);
  const int64_t whole_rows = rows / TRANSPOSED * TRANSPOSED, whole_columns = columns / TRANSPOSED * TRANSPOSED;
  for (int64_t r = 0; r < whole_rows; r += TRANSPOSED)
    for (int64_t c = 0; c < whole_columns; c += TRANSPOSED)
      transpose_block(from + r * from_row + c, from_row, to + c * to_row + r, to_row);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      std::memcpy(to + c * to_row + r, from + r * from_row + c, 4);
}

template <class Dot>
struct Element;
template <>
struct Element<FloatDot> {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct Element<BFloat16Dot> {
  using type = uint16_t;
};
#endif
#if defined(FASTATTN_AMX)
template <>
struct Element<TileDot> {
  using type = uint16_t;
};
#endif

// Steps of a product over n numbers.
template <class Dot>
INLINE int64_t steps_of(int64_t n) {
  return round_up((n + Dot::PER_WORD - 1) / Dot::PER_WORD, Dot::STEPS);
}

// Rows already read as [rows][ld] numbers -> `across`.
template <class Dot>
static void to_across(const typename Element<Dot>::type* rows, int64_t ld, typename Dot::Word* to) {
  transpose(rows, ld / Dot::PER_WORD, BLOCK_M, ld / Dot::PER_WORD, to, BLOCK_M);
}

// Where the `pairs` of a tile of keys lie: as rows of pairs of keys, or, for tiles, as rows of numbers. Strides between
// numbers of a row, and between pairs of keys.
template <class Dot>
struct PairsOf {
  int64_t row, step;
  explicit PairsOf(int64_t width) : row(IS_TILED<Dot> ? BLOCK_N / 2 : 1), step(IS_TILED<Dot> ? 1 : width) {}
};

// Rows already read as [count][ld] numbers -> `pairs` [count / 2][ld].
INLINE void to_pairs(const uint16_t* rows, int64_t ld, int64_t count, uint32_t* to) {
  for (int64_t r = 0; r < count; r += 2)
    for (int64_t d = 0; d < ld; ++d)
      to[r / 2 * ld + d] = rows[r * ld + d] | static_cast<uint32_t>(rows[(r + 1) * ld + d]) << 16;
}

// Whether all numbers are finite.
INLINE bool all_finite(const float* numbers, int64_t n) {
  int32_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, numbers + i, 4);
    found |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return found == 0;
}

INLINE bool all_finite(const uint16_t* numbers, int64_t n) {
  int32_t found = 0;
  for (int64_t i = 0; i < n; ++i) found |= (numbers[i] & 0x7f80u) == 0x7f80u;
  return found == 0;
}

// Weights [keys][BLOCK_M] -> `pairs` over keys: [keys / PER_WORD][BLOCK_M].
template <class Dot>
INLINE const typename Dot::Word* weight_pairs(int vectors, int keys, const float* weights, typename Dot::Word* to) {
  if constexpr (Dot::PER_WORD == 1) {
    return weights;
  } else {
    for (int r = 0; r < keys; r += 2)
      for (int n = 0; n < vectors * VL; n += VL)
        store(to + r / 2 * BLOCK_M + n,
              Dot::pair(load(weights + r * BLOCK_M + n), load(weights + (r + 1) * BLOCK_M + n)));
    return to;
  }
}

// Weights [keys][BLOCK_M] -> `along`, a product over queries: [keys][BLOCK_M / PER_WORD].
template <class Dot>
INLINE const typename Dot::Word* weight_rows(int keys, const float* weights, typename Dot::Word* to) {
  if constexpr (Dot::PER_WORD == 1) {
    return weights;
  } else {
    char* out = reinterpret_cast<char*>(to);
    for (int at = 0; at < keys * BLOCK_M; at += VL) Dot::store_rounded(out + at * 2, load(weights + at));
    return to;
  }
}

}  // namespace fastattn::FASTATTN_ISA
