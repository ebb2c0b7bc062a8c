// The swizzles of TMA and wgmma: within eight rows of 128, 64 or 32 bytes, 16-byte pieces change places by the row's
// number, which is read off the address itself. PTX ISA: tensor swizzling modes.
#pragma once

#include <cstdint>

namespace fastattn::sim {

// `mode` as arch::Swizzle numbers it: 0 none, 1 of 32 bytes, 2 of 64, 3 of 128.
inline uint32_t swizzled(uint32_t address, int mode) {
  const uint32_t bits = (1u << mode) - 1;
  return address ^ (address >> 7 & bits) << 4;
}

inline uint32_t swizzle_span(int mode) { return 16u << mode; }

}  // namespace fastattn::sim
