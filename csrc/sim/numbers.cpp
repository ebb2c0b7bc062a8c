#include "numbers.h"

#include <cmath>

#include "instructions.h"

namespace fastattn::sim {

namespace {

// .ftz: a denormal is a zero of its sign.
float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// A GPU has one NaN, and code that takes a number's bits apart sees which.
float canonical(float x) { return x != x ? bits_float(0x7fffffff) : x; }

}  // namespace

float exp2_approx(float x) { return canonical(flushed(std::exp2(flushed(x)))); }
float log2_approx(float x) { return canonical(std::log2(flushed(x))); }
float tanh_approx(float x) { return canonical(std::tanh(x)); }
float reciprocal_approx(float x) { return canonical(flushed(1.0f / flushed(x))); }
float max_nan(float x, float y) {
  if (x == y) return std::signbit(x) ? y : x;  // of two zeros, the positive one
  return canonical(x != x || x > y ? x : y);
}
float half_to_float(uint16_t bits) { return from_f16(bits); }

uint32_t pack(float low, float high, bool bf16) {
  return to_half(low, bf16) | static_cast<uint32_t>(to_half(high, bf16)) << 16;
}

}  // namespace fastattn::sim
