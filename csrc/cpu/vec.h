// Vectors of floats in the compiler's own terms, as wide as the instruction set of this translation unit.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../common/params.h"

#define INLINE inline __attribute__((always_inline))

namespace fastattn::FASTATTN_ISA {

#if defined(__AVX512F__)
constexpr int VL = 16;  // floats a vector
constexpr int BLOCK_M = 48;
constexpr int LANE_VECTORS = 3, LANE_ROWS = 8;      // registers of a product whose columns are queries
constexpr int COLUMN_VECTORS = 4, COLUMN_ROWS = 4;  // and of one whose columns are head dimensions
#elif defined(__AVX2__)
constexpr int VL = 8;
constexpr int BLOCK_M = 48;
constexpr int LANE_VECTORS = 3, LANE_ROWS = 4;
constexpr int COLUMN_VECTORS = 2, COLUMN_ROWS = 4;
#else
constexpr int VL = 4;
constexpr int BLOCK_M = 48;
constexpr int LANE_VECTORS = 2, LANE_ROWS = 4;
constexpr int COLUMN_VECTORS = 2, COLUMN_ROWS = 4;
#endif
constexpr int BLOCK_N = 64;
constexpr int VECTORS = BLOCK_M / VL;  // vectors that hold one number for each query of a tile

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
INLINE vi splat_int(int32_t x) { return x - vi{}; }

constexpr float kInfinity = __builtin_inff();

// The larger one; x where either is NaN.
INLINE vf larger(vf x, vf y) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)y, (__m512)x);
#else
  return y > x ? y : x;
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

// e^x to about one ulp: x = n ln 2 + r, a polynomial in r (Cephes' expf), n into the exponent. 0 below -87.3; NaN stays.
INLINE vf exponential(vf x) {
#if defined(__AVX512F__)
  // Scaling by 2^n saturates by itself.
  const vf n = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504088896341f), 0);
#else
  const vi tiny = x < -87.3f;
  const vf bounded = x > 88.0f ? splat(88.0f) : tiny ? splat(-87.3f) : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = bounded * 1.44269504088896341f + magic;
  const vf n = shifted - magic;
#endif
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  // -inf - (-inf) above is NaN; what lies below the range is 0.
  const __mmask16 tiny = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-87.3f), _CMP_LT_OQ);
  return (vf)_mm512_mask_blend_ps(tiny, _mm512_scalef_ps((__m512)p, (__m512)n), _mm512_setzero_ps());
#else
  const vi bits = ((vi)shifted - (vi)splat(magic)) << 23;
  const vf scaled = (vf)((vi)p + bits);
  const vf huge = x > 88.0f ? splat(kInfinity) : scaled;
  return tiny ? vf{} : x == x ? huge : x;
#endif
}

// tanh by Eigen's rational approximation, a few ulp.
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
  return x * p / q;
}

INLINE float to_float(uint16_t bits, DType dtype) {
  uint32_t word;
  if (dtype == kBFloat16) {
    word = static_cast<uint32_t>(bits) << 16;
  } else {
#if defined(__F16C__) || defined(__AVX512F__)
    return _cvtsh_ss(bits);
#else
    // Move exponent and fraction into place, then scale by 2^112: denormals come out right.
    const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 5.192296858534828e33f;
    std::memcpy(&word, &value, 4);
    if ((bits & 0x7c00) == 0x7c00) word |= 0x7f800000u;
    word |= static_cast<uint32_t>(bits & 0x8000) << 16;
#endif
  }
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// Rounds to nearest, ties to even.
INLINE uint16_t from_float(float value, DType dtype) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (dtype == kBFloat16) {
    if ((word & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((word >> 16) | 0x40);
    return static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
  }
#if defined(__F16C__) || defined(__AVX512F__)
  return static_cast<uint16_t>(_cvtss_sh(value, 0));
#else
  const uint16_t sign = static_cast<uint16_t>((word >> 16) & 0x8000);
  word &= 0x7fffffffu;
  if (word > 0x7f800000u) return sign | 0x7e00;
  if (word >= 0x477ff000u) return sign | 0x7c00;
  if (word < 0x38800000u) {  // a denormal: let an addition at its scale round
    float magnitude;
    std::memcpy(&magnitude, &word, 4);
    magnitude += 0.5f;
    std::memcpy(&word, &magnitude, 4);
    return static_cast<uint16_t>(sign | (word - 0x3f000000u));
  }
  word += 0xfff + ((word >> 13) & 1);
  return static_cast<uint16_t>(sign | ((word - 0x38000000u) >> 13));
#endif
}

}  // namespace fastattn::FASTATTN_ISA
