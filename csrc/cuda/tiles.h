// The tile table of the forward kernels: how many queries and keys a block works on at a time, and with how many
// threads.
//
// A block is one warpgroup that loads and 2 or 3 that compute, 64 queries each. What limits a tile: shared memory
// (227 KiB: the queries, and STAGES tiles of keys and of values), and registers (240 a thread with 2 computing
// warpgroups, 160 with 3): scores BLOCK_N / 2, their weights half of that, the output head_dim_v / 2.
// Sizes after FlashAttention-3 (Shah et al. 2024; its tile_size.h), weights always in registers.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

enum KernelVariant : int32_t {
  kPlain = 0,    // every key is visible
  kMasked = 1,   // each query sees one or two intervals of keys
  kGeneral = 2,  // the same or block lists; bias, soft cap, dropout, scales of any sign and size
};

struct TileSize {
  int block_m, block_n, stages;
  int poly_every;  // of so many exponentials one is a polynomial on the FMA pipes, the others are MUFU's; 0: none
  constexpr int consumers() const { return block_m / 64; }
  constexpr int threads() const { return (consumers() + 1) * 128; }
};

// Widths that there are kernels for, [keys' and queries', values']; a head is padded to the next one that holds both.
constexpr int kWidths[][2] = {{64, 64}, {96, 96}, {128, 128}, {192, 128}, {192, 192}, {256, 256}};
constexpr int kWidthCount = sizeof kWidths / sizeof kWidths[0];

// Head dim 64 is bound by the exponentials: three warpgroups, and a share of them computed elsewhere.
constexpr TileSize tile_size(int width, int width_v, KernelVariant variant) {
  if (width <= 64) return variant == kGeneral ? TileSize{128, 128, 3, 16} : TileSize{192, 128, 3, 16};
  if (width <= 96) return {128, variant == kPlain ? 176 : 128, 2, 0};
  if (width <= 128) return {128, variant == kPlain ? 176 : 128, 2, 0};
  if (width <= 192 && width_v <= 128) return {128, variant == kGeneral ? 96 : 128, 2, 0};
  if (width <= 192) return {128, variant == kPlain ? 112 : variant == kMasked ? 96 : 80, 2, 0};
  return {128, variant == kGeneral ? 64 : 80, 2, 0};
}

// The place in kWidths of the kernel for a head, or -1: wider than any.
constexpr int width_index(int64_t head_dim, int64_t head_dim_v) {
  for (int n = 0; n < kWidthCount; ++n)
    if (head_dim <= kWidths[n][0] && head_dim_v <= kWidths[n][1]) return n;
  return -1;
}

}  // namespace fastattn::cuda
