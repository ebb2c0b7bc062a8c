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

INLINE const char* row_at(const Table& table, int64_t b, int64_t h, int64_t i) {
  const int64_t at = b * table.stride[0] + h * table.stride[1] + i * table.stride[2];
  return static_cast<const char*>(table.data) + at * (table.dtype == kFloat32 ? 4 : 2);
}

// n numbers as float, the rest up to `width` zero.
static void read_row(const Table& table, const char* from, int64_t n, int64_t width, float* to) {
  const int64_t step = table.stride[3];
  if (table.dtype == kFloat32) {
    const float* row = reinterpret_cast<const float*>(from);
    if (step == 1)
      std::memcpy(to, row, n * 4);
    else
      for (int64_t d = 0; d < n; ++d) to[d] = row[d * step];
  } else {
    const uint16_t* row = reinterpret_cast<const uint16_t*>(from);
    if (table.dtype == kBFloat16 && step == 1)
      for (int64_t d = 0; d < n; ++d) to[d] = to_float(row[d], kBFloat16);
    else if (table.dtype == kBFloat16)
      for (int64_t d = 0; d < n; ++d) to[d] = to_float(row[d * step], kBFloat16);
    else {
      int64_t d = 0;
#if defined(__F16C__) || defined(__AVX512F__)
      if (step == 1)
        for (; d + 8 <= n; d += 8)
          _mm256_storeu_ps(to + d, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + d))));
#endif
      for (; d < n; ++d) to[d] = to_float(row[d * step], kFloat16);
    }
  }
  for (int64_t d = n; d < width; ++d) to[d] = 0.0f;
}

// The same as raw half-precision bits.
static void read_row(const Table& table, const char* from, int64_t n, int64_t width, uint16_t* to) {
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
  if (table.dtype == kFloat32) {
    float* row = reinterpret_cast<float*>(at);
    for (int64_t d = 0; d < n; ++d) row[d * step] = from[d];
  } else if (table.dtype == kBFloat16 && step == 1) {
    uint16_t* row = reinterpret_cast<uint16_t*>(at);
    for (int64_t d = 0; d < n; ++d) row[d] = from_float(from[d], kBFloat16);
  } else {
    uint16_t* row = reinterpret_cast<uint16_t*>(at);
    for (int64_t d = 0; d < n; ++d) row[d * step] = from_float(from[d], table.dtype);
  }
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

// Steps of a product over n numbers.
template <class Dot>
INLINE int64_t steps_of(int64_t n) {
  return (n + Dot::PER_WORD - 1) / Dot::PER_WORD;
}

// Rows already read as [rows][ld] numbers -> `across`.
template <class Dot>
static void to_across(const typename Element<Dot>::type* rows, int64_t ld, int64_t n, typename Dot::Word* to) {
  const int64_t steps = steps_of<Dot>(n);
  for (int lane = 0; lane < BLOCK_M; ++lane) {
    const char* row = reinterpret_cast<const char*>(rows + lane * ld);
    for (int64_t k = 0; k < steps; ++k) to[k * BLOCK_M + lane] = load<typename Dot::Word>(row + k * 4);
  }
}

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
    for (int at = 0; at < keys * BLOCK_M; at += VL) Dot::narrow(out + at * 2, load(weights + at));
    return to;
  }
}

}  // namespace fastattn::FASTATTN_ISA
