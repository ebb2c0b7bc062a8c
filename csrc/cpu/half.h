// Half-precision numbers as bits, to float and back.
#pragma once

#include "vec.h"

namespace fastattn::FASTATTN_ISA {

INLINE float to_float(uint16_t bits, DType dtype) {
  uint32_t word;
  if (dtype == kBFloat16) {
    word = static_cast<uint32_t>(bits) << 16;
  } else {
#if defined(__F16C__) || defined(__AVX512F__)
    return _cvtsh_ss(bits);
#else
    // Exponent and fraction to their places, the exponent's bias raised by 112. No step passes through a denormal
    // float, which would be flushed: a half's denormal is read as 2^-14 plus it, and 2^-14 is taken off.
    word = (static_cast<uint32_t>(bits & 0x7fff) << 13) + 0x38000000u;
    if ((bits & 0x7c00) == 0x7c00) word |= 0x7f800000u;
    if ((bits & 0x7c00) == 0) {
      word += 0x00800000u;
      float shifted;
      std::memcpy(&shifted, &word, 4);
      shifted -= 6.103515625e-5f;
      std::memcpy(&word, &shifted, 4);
    }
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

// A vector of numbers from memory, as float; and back, rounded.
struct ReadFloat {
  static constexpr int BYTES = 4;
  static INLINE vf read(const char* from) { return load(from); }
};

typedef uint16_t vh __attribute__((vector_size(VL * 2)));

struct ReadBFloat16 {
  static constexpr int BYTES = 2;
  static INLINE vf read(const char* from) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16);
#elif defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from)), 16);
#else
    return (vf)(__builtin_convertvector(load<vh>(from), vu) << 16);
#endif
  }
};

struct ReadFloat16 {
  static constexpr int BYTES = 2;
  static INLINE vf read(const char* from) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(load<__m256i>(from));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(load<__m128i>(from));
#else
    vf wide;
    const vh half = load<vh>(from);
    for (int lane = 0; lane < VL; ++lane) wide[lane] = to_float(half[lane], kFloat16);
    return wide;
#endif
  }
};

INLINE vh to_bfloat16(vf numbers) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)numbers);
  return load<vh>(&half);
#else
  const vu word = (vu)numbers;
  const vu rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16, quiet = (word >> 16) | 0x40u;
  return __builtin_convertvector(numbers == numbers ? rounded : quiet, vh);
#endif
}

INLINE vh to_float16(vf numbers) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_cvtps_ph((__m512)numbers, 0);
  return load<vh>(&half);
#elif defined(__F16C__)
  const __m128i half = _mm256_cvtps_ph((__m256)numbers, 0);
  return load<vh>(&half);
#else
  vh half;
  for (int lane = 0; lane < VL; ++lane) half[lane] = from_float(numbers[lane], kFloat16);
  return half;
#endif
}

}  // namespace fastattn::FASTATTN_ISA
