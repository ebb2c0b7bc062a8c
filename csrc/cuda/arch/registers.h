// Registers handed from one warpgroup to another.
#pragma once

#include "dialect.h"

namespace fastattn::arch {

// The warpgroup keeps COUNT registers a thread, a multiple of 8 from 24 to 256, and gives the others back.
// PTX ISA: setmaxnreg.
template <int COUNT>
DEVICE void registers_shrink_to() {
  static_assert(COUNT >= 24 && COUNT <= 256 && COUNT % 8 == 0, "a multiple of 8 from 24 to 256");
#ifdef FASTATTN_SIM
  sim::registers_set(COUNT, false);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

// Waits until COUNT registers a thread can be had.
template <int COUNT>
DEVICE void registers_grow_to() {
  static_assert(COUNT >= 24 && COUNT <= 256 && COUNT % 8 == 0, "a multiple of 8 from 24 to 256");
#ifdef FASTATTN_SIM
  sim::registers_set(COUNT, true);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

}  // namespace fastattn::arch
