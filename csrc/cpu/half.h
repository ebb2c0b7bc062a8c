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
