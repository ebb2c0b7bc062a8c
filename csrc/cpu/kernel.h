// The three passes for one instruction set. A translation unit names it (FASTATTN_ISA), has its own compiler flags, and
// includes this file alone.
#pragma once

#include "backward.h"
#include "forward.h"
#include "weights.h"

#if defined(FASTATTN_AMX)
namespace fastattn::avx512bf16 {
const char* forward(const Params& p);
const char* backward(const Params& p);
const char* weights(const Params& p);
}  // namespace fastattn::avx512bf16
#endif

namespace fastattn::FASTATTN_ISA {

#if defined(FASTATTN_AMX)
// Tiles take bfloat16; other numbers have the kernels of the machine's vectors.
#define FASTATTN_PASS(name) \
  const char* name(const Params& p) { return p.dtype == kBFloat16 ? run_##name<TileDot>(p) : avx512bf16::name(p); }
#elif defined(__AVX512BF16__)
#define FASTATTN_PASS(name)                                                             \
  const char* name(const Params& p) {                                                   \
    return p.dtype == kBFloat16 ? run_##name<BFloat16Dot>(p) : run_##name<FloatDot>(p); \
  }
#else
#define FASTATTN_PASS(name) \
  const char* name(const Params& p) { return run_##name<FloatDot>(p); }
#endif

FASTATTN_PASS(forward)
FASTATTN_PASS(backward)
FASTATTN_PASS(weights)
#undef FASTATTN_PASS

}  // namespace fastattn::FASTATTN_ISA
