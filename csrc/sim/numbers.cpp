#include "numbers.h"

#include <cmath>

#include "instructions.h"

namespace fastattn::sim {

namespace {

// .ftz: a denormal is a zero of its sign.
float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

}  // namespace

float exp2_approx(float x) { return flushed(std::exp2(flushed(x))); }
float log2_approx(float x) { return std::log2(flushed(x)); }
float tanh_approx(float x) { return std::tanh(x); }
float reciprocal_approx(float x) { return flushed(1.0f / flushed(x)); }
float half_to_float(uint16_t bits) { return from_f16(bits); }

uint32_t pack(float low, float high, bool bf16) {
  return to_half(low, bf16) | static_cast<uint32_t>(to_half(high, bf16)) << 16;
}

}  // namespace fastattn::sim
