// What a block of the forward kernel shares, and the rings in which tiles of keys and values come and go.
#pragma once

#include "args.h"
#include "tiles.h"
#include "walk.h"

namespace fastattn::cuda {

// One forward kernel: dtype, widths of the heads, variant.
template <class T_, int WIDTH_, int WIDTH_V_, KernelVariant VARIANT_>
struct Forward {
  using T = T_;
  static constexpr int WIDTH = WIDTH_, WIDTH_V = WIDTH_V_;
  static constexpr KernelVariant VARIANT = VARIANT_;
  static constexpr TileSize TILE = tile_size(WIDTH, WIDTH_V, VARIANT);
  static constexpr int BLOCK_M = TILE.block_m, BLOCK_N = TILE.block_n, STAGES = TILE.stages;
  static constexpr int CONSUMERS = TILE.consumers(), THREADS = TILE.threads();
  static constexpr int PIECES = (WIDTH + 63) / 64, PIECES_V = (WIDTH_V + 63) / 64;  // of 64 columns, side by side
  static constexpr int SCORES = BLOCK_N / 2, OUT = WIDTH_V / 2;                     // registers of a thread
  static constexpr bool TURNS = WIDTH_V <= 128;  // warpgroups take turns on the tensor cores
  // A block starts with as many for each thread as fit (168 of three warpgroups, 128 of four), and shares those out.
  static constexpr int REGISTERS = CONSUMERS == 3 ? 160 : 232, REGISTERS_LOADING = CONSUMERS == 3 ? 32 : 40;
  static_assert(REGISTERS * CONSUMERS + REGISTERS_LOADING <= (CONSUMERS + 1) * (65536 / THREADS / 8 * 8),
                "of the SM's");
};

// Tiles lie as TMA's 128-byte swizzle leaves them: pieces of 64 columns, each [rows][64].
template <class F>
struct alignas(1024) Shared {
  uint16_t query[F::PIECES * F::BLOCK_M * 64];
  uint16_t key[F::STAGES][F::PIECES * F::BLOCK_N * 64];
  uint16_t value[F::STAGES][F::PIECES_V * F::BLOCK_N * 64];
  int4 seen[F::VARIANT == kPlain ? 1 : F::BLOCK_M];  // each row's intervals
  Job job[2];
  Steps steps;                                            // the loading warp's own, as it has few registers
  int32_t program, round;                                 // the same
  int32_t note[F::STAGES];                                // about the tile of keys
  uint32_t nonfinite[F::STAGES][(F::BLOCK_N + 31) / 32];  // keys whose values were not finite and were set to 0
  arch::Mbarrier job_full[2], job_empty[2], query_full, query_empty;
  arch::Mbarrier key_full[F::STAGES], key_empty[F::STAGES], value_full[F::STAGES], value_empty[F::STAGES];
  arch::Mbarrier value_landed;  // before they are looked through
};

// Where a ring of COUNT places stands: the place, and the parity of its round. One register.
template <int COUNT>
struct Ring {
  uint32_t state = 0;

  DEVICE int place() const { return static_cast<int>(state & 0xff); }
  DEVICE uint32_t round() const { return state >> 8; }
  DEVICE void next() {
    ++state;
    if (place() == COUNT) state = (state & 0x100) ^ 0x100;
  }
};

// A whole warp's arrival, counted once.
DEVICE void arrive_warp(arch::Mbarrier* barrier) {
  __syncwarp();
  if (threadIdx.x % arch::kWarp == 0) arch::mbarrier_arrive(barrier);
}

// Named barriers; 0 is __syncthreads.
constexpr int kTurnBarrier = 1;

}  // namespace fastattn::cuda
