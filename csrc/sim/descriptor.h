// Where a wgmma operand lies in shared memory: the 64-bit descriptor, and the address of each of its 16-byte pieces.
// PTX ISA: asynchronous warpgroup-level matrix shared memory layout, matrix-descriptor.
#pragma once

#include <cstdint>

#include "swizzle.h"

namespace fastattn::sim {

struct Descriptor {
  uint32_t start, leading, stride;  // bytes
  int mode;                         // a swizzle, as arch::Swizzle numbers it
  bool valid;                       // no base offset, no bit that the format leaves out

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        mode(static_cast<int>(4 - (bits >> 62)) % 4),
        valid((bits & 0x3fffc000c000c000ull) == 0) {}

  // Whether the pattern of eight rows starts where the hardware takes it to without a base offset: at a multiple of its
  // size. Only steps within a row move the start: along k, or, MN-major, along m or n.
  bool aligned() const { return mode == 0 || start % (8 * swizzle_span(mode)) < swizzle_span(mode); }

  // K-major: piece `piece` (0 or 1, eight ks each) of row `mn`.
  uint32_t k_major(uint32_t mn, uint32_t piece) const {
    const uint32_t row = start + mn / 8 * stride + mn % 8 * swizzle_span(mode);
    return swizzled(row + piece * (mode == 0 ? leading : 16), mode);
  }

  // MN-major: piece `piece` (eight ms or ns each) of row `k`.
  uint32_t mn_major(uint32_t k, uint32_t piece) const {
    const uint32_t pieces = swizzle_span(mode) / 16;
    const uint32_t next_mn = mode == 0 ? stride : leading, next_k = mode == 0 ? leading : stride;
    const uint32_t row = start + k / 8 * next_k + k % 8 * swizzle_span(mode);
    return swizzled(row + piece / pieces * next_mn + piece % pieces * 16, mode);
  }
};

}  // namespace fastattn::sim
