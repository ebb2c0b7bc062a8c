// Vectors of floats in the compiler's own terms, as wide as the instruction set of this translation unit.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE__)
#include <immintrin.h>
#endif

#include "../common/params.h"

#define INLINE inline __attribute__((always_inline))

namespace fastattn::FASTATTN_ISA {

// The block sizes of each instruction set. Kernels look at whole steps of keys, vectors of queries and numbers of a
// row.
#if defined(FASTATTN_AMX)
constexpr int VL = 16;  // floats a vector
constexpr int BLOCK_M = 32;
constexpr int KEY_STEP = 32, VECTOR_STEP = 2, WIDTH_STEP = 32;  // two tiles each way (tile_products.h)
#elif defined(__AVX512F__)
constexpr int VL = 16;
constexpr int BLOCK_M = 48;
constexpr int LANE_VECTORS = 3, LANE_ROWS = 8;      // registers of a product whose columns are queries
constexpr int COLUMN_VECTORS = 4, COLUMN_ROWS = 4;  // and of one whose columns are head dimensions
constexpr int KEY_STEP = 8, VECTOR_STEP = 1, WIDTH_STEP = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
constexpr int BLOCK_M = 48;
constexpr int LANE_VECTORS = 3, LANE_ROWS = 4;
constexpr int COLUMN_VECTORS = 2, COLUMN_ROWS = 4;
constexpr int KEY_STEP = 8, VECTOR_STEP = 1, WIDTH_STEP = 8;
#else
constexpr int VL = 4;
constexpr int BLOCK_M = 48;
constexpr int LANE_VECTORS = 3, LANE_ROWS = 4;
constexpr int COLUMN_VECTORS = 2, COLUMN_ROWS = 4;
constexpr int KEY_STEP = 8, VECTOR_STEP = 1, WIDTH_STEP = 4;
#endif
constexpr int BLOCK_N = 64;  // a bit each in a word of visibility

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));

template <class V = vf>
INLINE V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class V>
INLINE void store(void* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

INLINE vf splat(float x) { return x - vf{}; }

// The number as it was rounded: no compiler makes one operation of a product and a sum with this between them.
INLINE vf rounded(vf x) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(x));
#elif defined(__SSE__)
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#else
  __asm__("" : "+m"(x));
#endif
  return x;
}

// a * b - c; where FUSES, without rounding the product.
#if defined(__AVX512F__)
constexpr bool FUSES = true;
INLINE vf product_less(vf a, vf b, vf c) { return (vf)_mm512_fmsub_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__FMA__) && defined(__AVX2__)
constexpr bool FUSES = true;
INLINE vf product_less(vf a, vf b, vf c) { return (vf)_mm256_fmsub_ps((__m256)a, (__m256)b, (__m256)c); }
#else
constexpr bool FUSES = false;
INLINE vf product_less(vf a, vf b, vf c) { return rounded(a * b) - c; }
#endif

constexpr float kInfinity = __builtin_inff();

// The larger one; x where either is NaN.
INLINE vf larger(vf x, vf y) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)y, (__m512)x);
#else
  return y > x ? y : x;
#endif
}

// The number, or 0 where it is more; NaN stays.
INLINE vf at_most_zero(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps(_mm512_setzero_ps(), (__m512)x);
#else
  return x > 0.0f ? vf{} : x;
#endif
}

INLINE bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  int32_t bits = 0;
  for (int lane = 0; lane < VL; ++lane) bits |= mask[lane];
  return bits != 0;
#endif
}

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// 2^y to about one ulp: y = n + r with |r| <= 1/2, a polynomial in r, n into the exponent. 0 far below; NaN stays.
INLINE vf exp2(vf y) {
#if defined(__AVX512F__)
  // Scaling by 2^n saturates by itself; the bound keeps -inf - (-inf) out.
  y = (vf)_mm512_max_ps((__m512)splat(-200.0f), (__m512)y);
  const vf n = (vf)_mm512_roundscale_ps((__m512)y, 0), r = y - n;
#else
  const vi tiny = y < -126.0f;
  const vf bounded = y > 128.0f ? splat(128.0f) : tiny ? splat(-126.0f) : y;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = bounded + magic;
  const vf r = bounded - (shifted - magic);
#endif
  vf p = splat(1.535336188319500e-4f);
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const vi bits = ((vi)shifted - (vi)splat(magic)) << 23;
  const vf scaled = (vf)((vi)p + bits);
  const vf large = y > 127.999f ? splat(kInfinity) : scaled;
  return tiny ? vf{} : y == y ? large : y;
#endif
}

// The natural logarithm of a number from 1 on as a sum: an exact multiple of a short ln 2, and `rest`, to about 3e-8.
// (The series is FreeBSD's e_logf.c.) Infinity and NaN stay, in `rest`.
INLINE vf logarithm(vf x, vf* rest) {
  const vi exponent = ((vi)x - 0x3f3504f3) >> 23;  // so that what is left lies around 1
  const vf fraction = (vf)((vi)x - (exponent << 23)) - 1.0f, n = __builtin_convertvector(exponent, vf);
  const vf s = fraction / (fraction + 2.0f), z = s * s, half = 0.5f * fraction * fraction;
  vf r = splat(0.24279078841f);
  r = r * z + 0.28498786688f;
  r = r * z + 0.40000972152f;
  r = r * z + 0.66666662693f;
  const vf near = fraction - (half - s * (half + z * r));
  *rest = x < kInfinity ? near + n * 9.0580006145e-06f : x;
  return x < kInfinity ? n * 0.69313812256f : vf{};
}

// tanh by Eigen's rational approximation, a few ulp; exactly 1 where a float has nothing between it and 1.
INLINE vf hyperbolic_tangent(vf given) {
  const float edge = 7.90531110763549805f;
  const vf x = given > edge ? splat(edge) : given < -edge ? splat(-edge) : given;
  const vf x2 = x * x;
  vf p = splat(-2.76076847742355e-16f);
  p = p * x2 + 2.00018790482477e-13f;
  p = p * x2 + -8.60467152213735e-11f;
  p = p * x2 + 5.12229709037114e-08f;
  p = p * x2 + 1.48572235717979e-05f;
  p = p * x2 + 6.37261928935436e-04f;
  p = p * x2 + 4.89352455891786e-03f;
  vf q = splat(1.19825839466702e-06f);
  q = q * x2 + 1.18534705686654e-04f;
  q = q * x2 + 2.26843463243900e-03f;
  q = q * x2 + 4.89352518554385e-03f;
  const float whole = 9.010913f;
  return given > whole ? splat(1.0f) : given < -whole ? splat(-1.0f) : x * p / q;
}

}  // namespace fastattn::FASTATTN_ISA
