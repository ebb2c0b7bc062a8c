// Arithmetic in one instruction: approximate functions, and two floats into two halves of a register and back.
#pragma once

#include "dialect.h"

namespace fastattn::arch {

// 2^x, relative error 2^-22, denormals are 0; 2^-inf is 0. On the MUFU unit: 16 a clock and SM. PTX ISA: ex2.
DEVICE float exp2_approx(float x) {
#ifdef FASTATTN_SIM
  return sim::exp2_approx(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// log2(x), absolute error 2^-22 near 1; log2(0) is -inf. PTX ISA: lg2.
DEVICE float log2_approx(float x) {
#ifdef FASTATTN_SIM
  return sim::log2_approx(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// tanh(x), relative error 2^-11. PTX ISA: tanh.
DEVICE float tanh_approx(float x) {
#ifdef FASTATTN_SIM
  return sim::tanh_approx(x);
#else
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1/x, relative error 2^-23. PTX ISA: rcp.
DEVICE float reciprocal_approx(float x) {
#ifdef FASTATTN_SIM
  return sim::reciprocal_approx(x);
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// The larger one, and NaN where either is: the canonical one, 0x7fffffff. PTX ISA: max (.NaN).
DEVICE float max_nan(float x, float y) {
#ifdef FASTATTN_SIM
  return sim::max_nan(x, y);
#else
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
#endif
}

// Two floats rounded to nearest even; `low` in the lower 16 bits, which is the lower address. PTX ISA: cvt.
template <class T>
DEVICE uint32_t pack(float low, float high) {
  static_assert(same_type<T, bf16> || same_type<T, f16>, "bf16 or f16");
#ifdef FASTATTN_SIM
  return sim::pack(low, high, same_type<T, bf16>);
#else
  uint32_t both;
  if constexpr (same_type<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
  return both;
#endif
}

// One half, as a float. PTX ISA: cvt.
template <class T>
DEVICE float to_float(T half) {
  static_assert(same_type<T, bf16> || same_type<T, f16>, "bf16 or f16");
  if constexpr (same_type<T, bf16>) {
    return __uint_as_float(static_cast<uint32_t>(half.bits) << 16);
  } else {
#ifdef FASTATTN_SIM
    return sim::half_to_float(half.bits);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(half.bits));
    return y;
#endif
  }
}

// The two halves of a register; element 0 is the lower one.
template <class T>
DEVICE float unpack(uint32_t both, int element) {
  return to_float(T{static_cast<uint16_t>(both >> (16 * element))});
}

}  // namespace fastattn::arch
