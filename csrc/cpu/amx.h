// The tile instructions of Intel AMX, a function each (Intel 64 and IA-32 Architectures Software Developer's Manual,
// vol. 2; the tile model is in vol. 1, chapter 18). A tile is 16 rows of 64 bytes; a template argument names one of
// eight.
//
// With FASTATTN_EMULATE_AMX defined they are plain C++ that gives the same bits, so that what is built on them can be
// tested on a machine without such tiles.
#pragma once

#if defined(FASTATTN_EMULATE_AMX)
#include <cfloat>
#include <cmath>
#endif

#include "vec.h"

namespace fastattn::FASTATTN_ISA {

constexpr int TILE_ROWS = 16, TILE_WORDS = 16;  // a word: a float, or two bfloat16

#if defined(FASTATTN_EMULATE_AMX)

struct EmulatedTiles {
  bool shaped = false;
  uint32_t word[8][TILE_ROWS][TILE_WORDS];
};

inline thread_local EmulatedTiles emulated;

// Instructions on tiles without a shape fault.
inline void need_shape() {
  if (!emulated.shaped) __builtin_trap();
}

inline void shape_tiles() { emulated.shaped = true; }
inline void release_tiles() { emulated.shaped = false; }

template <int T>
void load_tile(const void* from, int64_t row_bytes) {
  need_shape();
  for (int r = 0; r < TILE_ROWS; ++r)
    std::memcpy(emulated.word[T][r], static_cast<const char*>(from) + r * row_bytes, 64);
}

template <int T>
void store_tile(void* to, int64_t row_bytes) {
  need_shape();
  for (int r = 0; r < TILE_ROWS; ++r) std::memcpy(static_cast<char*>(to) + r * row_bytes, emulated.word[T][r], 64);
}

// A denormal counts as 0, going in and coming out, whatever the thread's MXCSR says.
inline float flushed(float number) { return std::fabs(number) < FLT_MIN ? std::copysign(0.0f, number) : number; }

// The bits that the instruction gives: for each element the first products of all pairs in one chain of fused
// multiply-adds, the second ones in another, both from 0; then the two chains' sum, and c once.
template <int C, int A, int B>
void multiply_tiles() {
  need_shape();
  const auto number = [](uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return flushed(value);
  };
  for (int r = 0; r < TILE_ROWS; ++r)
    for (int n = 0; n < TILE_WORDS; ++n) {
      float first = 0.0f, second = 0.0f;
      for (int k = 0; k < TILE_WORDS; ++k) {
        const uint32_t a = emulated.word[A][r][k], b = emulated.word[B][k][n];
        first = flushed(std::fma(number(a << 16), number(b << 16), first));
        second = flushed(std::fma(number(a & 0xffff0000u), number(b & 0xffff0000u), second));
      }
      const float sum = flushed(number(emulated.word[C][r][n]) + flushed(first + second));
      std::memcpy(&emulated.word[C][r][n], &sum, 4);
    }
}

#else

// LDTILECFG: all eight tiles, whole. Each thread has its own.
inline void shape_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes;
  static_assert(sizeof shapes == 64, "as the instruction reads it");
  for (int t = 0; t < 8; ++t) {
    shapes.row_bytes[t] = 4 * TILE_WORDS;
    shapes.rows[t] = TILE_ROWS;
  }
  __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
}

// TILERELEASE.
inline void release_tiles() { __asm__ volatile("tilerelease" : : : "memory"); }

// TILELOADD: 16 rows of 64 bytes, `row_bytes` apart.
template <int T>
INLINE void load_tile(const void* from, int64_t row_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(T) : "memory");
}

// TILESTORED.
template <int T>
INLINE void store_tile(void* to, int64_t row_bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(T) : "memory");
}

// TDPBF16PS: c[r][n] += sum over k of a[r][k] . b[k][n], words k of a and b being pairs.
template <int C, int A, int B>
INLINE void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B) : "memory");
}

#endif

// Zeros, by a load that reads one line over and over: TILEZERO amid vector work costs more.
template <int T>
INLINE void zero_tile() {
  alignas(64) static constexpr uint32_t LINE[TILE_WORDS] = {};
  load_tile<T>(LINE, 0);
}

// Tiles have a shape while this lives.
class ShapedTiles {
 public:
  ShapedTiles() { shape_tiles(); }
  ~ShapedTiles() { release_tiles(); }
};

}  // namespace fastattn::FASTATTN_ISA
