// Half-precision numbers of two kinds, as bits; rounding is to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastattn::sim {

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bf16(uint16_t bits) { return bits_float(uint32_t{bits} << 16); }

inline uint16_t to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if (value != value) return 0x7fff;  // what cvt gives
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_f16(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t rest = bits & 0x7fffu;
  if (rest >= 0x7c00) return bits_float(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  return bits_float(sign | float_bits(bits_float(rest << 13) * 0x1p112f));  // the exponent's bias is 15 here, 127 there
}

inline uint16_t to_f16(float value) {
  const uint32_t bits = float_bits(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return 0x7fff;                                 // NaN, as cvt gives it
  if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 or more: infinity
  if (rest < 0x38800000) {                                              // denormal: units of 2^-24
    const float units = bits_float(rest) * 0x1p24f;
    const float rounded = (units + 0x1p23f) - 0x1p23f;
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(rounded));
  }
  return static_cast<uint16_t>(sign | ((rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13));
}

inline float from_half(uint16_t bits, bool bf16) { return bf16 ? from_bf16(bits) : from_f16(bits); }
inline uint16_t to_half(float value, bool bf16) { return bf16 ? to_bf16(value) : to_f16(value); }

}  // namespace fastattn::sim
