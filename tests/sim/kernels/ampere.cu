// A product of matrices the way of sm_80: cp.async into two stages, ldmatrix, mma.sync. C[m, n] = A[m, k] B[n, k]^T in
// bf16 with float32 results. `bug` leaves something out: each value is a mistake that the simulator must catch.
#include "harness.h"

namespace {

constexpr int kM = 64, kN = 32, kK = 32, kThreads = 128;
constexpr int kPitch = kK + 8;  // halves: rows start in different banks

enum Bug : int {
  kNone = 0,
  kNoWait,         // reads a stage whose copies may not have landed
  kNoBarrier,      // reads what other threads have copied
  kOneStage,       // overwrites what others still read
  kWrongFragment,  // the two registers of B change places
  kTwoLanesApart,  // half a warp takes another way around the same product
  kNotCommitted,   // the wait does not cover the last copies
};

struct Args {
  const bf16* a;
  const bf16* b;
  float* c;
  int m, n, k, bug;
};

struct alignas(128) Shared {
  bf16 a[2][kM * kPitch];
  bf16 b[2][kN * kPitch];
};

// Rows of a tile, 16 bytes a copy; what lies beyond the matrix is zero.
template <int ROWS>
DEVICE void fetch(bf16* tile, const bf16* matrix, int first_row, int rows, int first_k, int k) {
  for (int piece = threadIdx.x; piece < ROWS * kK / 8; piece += kThreads) {
    const int row = piece / (kK / 8), at = piece % (kK / 8) * 8;
    const bool valid = first_row + row < rows && first_k + at < k;
    const bf16* from = valid ? matrix + static_cast<int64_t>(first_row + row) * k + first_k + at : matrix;
    copy_async(tile + row * kPitch + at, from, valid);
  }
}

__global__ void __launch_bounds__(kThreads) product(const __grid_constant__ Args args) {
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int bug = BUG_OF(args), lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row = blockIdx.x * kM, column = blockIdx.y * kN, tiles = (args.k + kK - 1) / kK;
  float sums[kN / 8][4] = {};
  const auto start = [&](int tile) {
    const int stage = bug == kOneStage ? 0 : tile % 2;
    fetch<kM>(shared.a[stage], args.a, row, args.m, tile * kK, args.k);
    fetch<kN>(shared.b[stage], args.b, column, args.n, tile * kK, args.k);
    if (bug != kNotCommitted || tile + 1 < tiles) copy_async_commit();
  };
  start(0);
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = bug == kOneStage ? 0 : tile % 2;
    if (bug != kNoWait) copy_async_wait<0>();
    if (bug != kNoBarrier) __syncthreads();
    if (tile + 1 < tiles) start(tile + 1);
#pragma unroll
    for (int step = 0; step < kK / 16; ++step) {
      uint32_t a[4];
      load_matrix_x4(a, shared.a[stage] + (warp * 16 + lane % 16) * kPitch + step * 16 + lane / 16 * 8);
#pragma unroll
      for (int pair = 0; pair < kN / 16; ++pair) {
        // Four matrices: both halves of the sixteen ks, of eight columns and of the next eight.
        uint32_t b[4];
        const int n = pair * 16 + lane / 16 * 8 + lane % 8;
        load_matrix_x4(b, shared.b[stage] + n * kPitch + step * 16 + lane / 8 % 2 * 8);
        const uint32_t first[2] = {b[bug == kWrongFragment], b[bug != kWrongFragment]}, second[2] = {b[2], b[3]};
        if (bug == kTwoLanesApart && lane >= 16) __syncwarp();
        mma_m16n8k16<bf16>(sums[2 * pair], a, first);
        mma_m16n8k16<bf16>(sums[2 * pair + 1], a, second);
      }
    }
  }
  if (bug == kNoWait) copy_async_wait<0>();
#pragma unroll
  for (int piece = 0; piece < kN / 8; ++piece) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = row + warp * 16 + lane / 4 + i / 2 * 8, n = column + piece * 8 + lane % 4 * 2 + i % 2;
      if (m < args.m && n < args.n) args.c[static_cast<int64_t>(m) * args.n + n] = sums[piece][i];
    }
  }
}

}  // namespace

EXPORT run_ampere(const void* a, const void* b, void* c, int m, int n, int k, int bug) {
  const Args args{static_cast<const bf16*>(a), static_cast<const bf16*>(b), static_cast<float*>(c), m, n, k, bug};
  Launch how;
  how.grid = dim3(static_cast<unsigned>((m + kM - 1) / kM), static_cast<unsigned>((n + kN - 1) / kN));
  how.threads = kThreads;
  how.shared_bytes = static_cast<int>(sizeof(Shared));
  return finished(launch(product, how, args));
}
