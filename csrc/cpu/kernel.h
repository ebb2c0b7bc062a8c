// The three passes for one instruction set. A translation unit names it (FASTATTN_ISA), has its own compiler flags, and
// includes this file alone.
#pragma once

#include "backward.h"
#include "forward.h"
#include "weights.h"

namespace fastattn::FASTATTN_ISA {

#if defined(__AVX512BF16__)
using HalfDot = BFloat16Dot;
#else
using HalfDot = FloatDot;
#endif

const char* forward(const Params& p) {
  return p.dtype == kBFloat16 ? run_forward<HalfDot>(p) : run_forward<FloatDot>(p);
}

const char* backward(const Params& p) {
  return p.dtype == kBFloat16 ? run_backward<HalfDot>(p) : run_backward<FloatDot>(p);
}

const char* weights(const Params& p) {
  return p.dtype == kBFloat16 ? run_weights<HalfDot>(p) : run_weights<FloatDot>(p);
}

}  // namespace fastattn::FASTATTN_ISA
