// CUDA's vector types, as the kernels and their hosts use them.
#pragma once

#include <cstdint>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned width = 1, unsigned height = 1, unsigned depth = 1) : x(width), y(height), z(depth) {}
};
struct uint3 {
  unsigned x, y, z;
};

#define FASTATTN_VECTORS(scalar, name, bytes)                                     \
  struct alignas(2 * bytes) name##2 { scalar x, y; };                             \
  struct alignas(4 * bytes > 16 ? 16 : 4 * bytes) name##4 { scalar x, y, z, w; }; \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }            \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }

FASTATTN_VECTORS(float, float, 4)
FASTATTN_VECTORS(int, int, 4)
FASTATTN_VECTORS(unsigned, uint, 4)
FASTATTN_VECTORS(uint16_t, ushort, 2)
#undef FASTATTN_VECTORS

using cudaStream_t = void*;
