// Written by generate_wgmma.py. What each N specialises: functions bf16_ss, bf16_rs, f16_ss, f16_rs; A and B are 1
// where the operand is contiguous along m or n, 0 along k.
#pragma once

#include "../dialect.h"

namespace fastattn::arch {

template <int N>
struct WgmmaVariant;

}  // namespace fastattn::arch
