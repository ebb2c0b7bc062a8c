// A product of matrices the Hopper way, small: TMA loads by a producer warpgroup into a ring of two stages, wgmma by a
// consumer warpgroup, the result through stmatrix and a TMA store. C[m, n] = A[m, k] B[n, k]^T, or B[k, n], all of one
// type. `bug` leaves something out: each value is a mistake that the simulator must catch.
#include "harness.h"

namespace {

constexpr int kM = 64, kN = 64, kK = 64, kStages = 2;

enum Bug : int {
  kNone = 0,
  kNoFullWait,   // reads a tile before it has landed
  kNoEmptyWait,  // overwrites a tile that is being read
  kNoWgmmaWait,  // reads sums in flight
  kNoWgmmaFence,
  kNoProxyFence,      // stores to shared memory, then TMA
  kNoStoreWait,       // ends with the store in flight
  kNoBarrier,         // one thread stores what the others may not have written yet
  kTouchAccumulator,  // writes a sum in flight
  kNoInitFence,
  kTooFewBytes,  // expects fewer bytes than land
  kTooManyBytes,
  kWrongPhase,    // waits for the phase that has been
  kEarlyRelease,  // frees a tile before the product that reads it is over
  kMisalignedTile,
  kTileOutOfBounds,
  kBadDescriptor,
  kNoCommit,
  kTwoArrivals,      // frees a stage twice
  kRegistersChange,  // overwrites A's fragment in flight
};

struct Args {
  TensorMap a, b, c;
  int k_tiles, bug;
};

template <class T>
struct alignas(1024) Shared {
  T a[kStages][kM * kK];
  T b[kStages][kN * kK];
  T c[kM * kN];
  Mbarrier full[kStages], empty[kStages];
};

template <class T, bool B_MN, bool A_REGISTERS>
__global__ void __launch_bounds__(256, 1) product(const __grid_constant__ Args args) {
  auto& shared = *reinterpret_cast<Shared<T>*>(dynamic_shared());
  const int thread = threadIdx.x % kWarpgroup, warpgroup = threadIdx.x / kWarpgroup, bug = BUG_OF(args);
  const int row = blockIdx.x * kM, column = blockIdx.y * kN;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&shared.full[stage], 1);
      mbarrier_init(&shared.empty[stage], kWarpgroup);
    }
    if (bug != kNoInitFence) mbarrier_init_fence();
  }
  __syncthreads();
  if (warpgroup == 0) {
    registers_shrink_to<40>();
    if (thread == 0) {
      prefetch_map(&args.a);
      for (int tile = 0; tile < args.k_tiles; ++tile) {
        const int stage = tile % kStages, phase = tile / kStages & 1;
        if (bug != kNoEmptyWait) mbarrier_wait(&shared.empty[stage], phase ^ 1);
        const int bytes = (kM + kN) * kK * 2 + (bug == kTooManyBytes ? 16 : bug == kTooFewBytes ? -16 : 0);
        mbarrier_arrive_expect(&shared.full[stage], bytes);
        T* a = shared.a[stage] + (bug == kMisalignedTile    ? 8
                                  : bug == kTileOutOfBounds ? sizeof(Shared<T>) / 2 - 1024
                                                            : 0);
        tma_load(a, &args.a, &shared.full[stage], tile * kK, row);
        if (B_MN) {
          tma_load(shared.b[stage], &args.b, &shared.full[stage], column, tile * kK);
        } else {
          tma_load(shared.b[stage], &args.b, &shared.full[stage], tile * kK, column);
        }
      }
    }
  } else {
    registers_grow_to<168>();
    constexpr Major kB = B_MN ? Major::kMN : Major::kK;
    float sums[kN / 2];
    uint32_t fragments[kK / 16][4];
    for (int tile = 0; tile < args.k_tiles; ++tile) {
      const int stage = tile % kStages, phase = tile / kStages & 1;
      if (bug != kNoFullWait) mbarrier_wait(&shared.full[stage], phase ^ (bug == kWrongPhase));
      uint64_t a = descriptor_128(shared.a[stage]), b = descriptor_128(shared.b[stage], 1024, 1024);
      if (bug == kBadDescriptor) a |= uint64_t{1} << 50;
      if (A_REGISTERS) {
        // Lane l addresses row l % 16 of the warp's sixteen, and half l / 16 of the sixteen ks; rows are swizzled.
#pragma unroll
        for (int step = 0; step < kK / 16; ++step) {
          const int in_tile = thread / 32 * 16 + thread % 16;
          const int piece = (step * 2 + thread % 32 / 16) ^ (in_tile % 8);
          load_matrix_x4(fragments[step], shared.a[stage] + in_tile * kK + piece * 8);
        }
      }
      if (bug == kEarlyRelease) mbarrier_arrive(&shared.empty[stage]);
      settle_registers(sums);
      if (bug != kNoWgmmaFence) wgmma_fence();
#pragma unroll
      for (int step = 0; step < kK / 16; ++step) {
        const uint64_t b_step = b + (B_MN ? step * 16 * 128 / 16 : step * 2);
        if (A_REGISTERS) {
          wgmma_rs<kN, T, kB>(sums, fragments[step], b_step, tile + step != 0);
        } else {
          wgmma_ss<kN, T, Major::kK, kB>(sums, a + step * 2, b_step, tile + step != 0);
        }
      }
      if (bug != kNoCommit) wgmma_commit();
      if (bug == kTouchAccumulator) sums[3] *= 2.0f;
      if (bug == kRegistersChange) fragments[0][0] += 1;
      if (bug != kNoWgmmaWait || tile + 1 < args.k_tiles) wgmma_wait<0>();
      settle_registers(sums);
      if (bug != kEarlyRelease) mbarrier_arrive(&shared.empty[stage]);
      if (bug == kTwoArrivals && thread == 0) mbarrier_arrive(&shared.empty[stage]);
    }
#pragma unroll
    for (int piece = 0; piece < kN / 16; ++piece) {
      uint32_t fragment[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[i] = pack<T>(sums[8 * piece + 2 * i], sums[8 * piece + 2 * i + 1]);
      const int in_tile = thread / 32 * 16 + thread % 16;
      const int at = (piece * 2 + thread % 32 / 16) ^ (in_tile % 8);
      store_matrix_x4(shared.c + in_tile * kN + at * 8, fragment);
    }
    if (bug != kNoProxyFence) fence_proxy_async();
    if (bug != kNoBarrier) barrier_sync(1, kWarpgroup);
    if (thread == 0) {
      tma_store(&args.c, shared.c, column, row, 0, 0);
      bulk_commit();
      if (bug != kNoStoreWait) bulk_wait_read<0>();
    }
    if (bug == kNoWgmmaWait) wgmma_wait<0>();
  }
}

template <class T>
const char* run_all(const T* a, const T* b, T* c, int m, int n, int k, bool b_mn, bool a_registers, int bug) {
  Args args;
  args.k_tiles = (k + kK - 1) / kK;
  args.bug = bug;
  TensorShape shape;
  shape.element = same_type<T, bf16> ? Element::kBFloat16 : Element::kFloat16;
  const auto describe = [&](TensorMap* map, const void* base, int rank, int rows, int columns, int box_rows) {
    shape.rank = rank;
    const uint64_t row_bytes = static_cast<uint64_t>(columns) * 2;
    const uint64_t extent[4] = {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows), 1, 1};
    const uint64_t stride[4] = {0, row_bytes, row_bytes * rows, row_bytes * rows};
    const uint32_t box[4] = {64, static_cast<uint32_t>(box_rows), 1, 1};
    for (int each = 0; each < rank; ++each) {
      shape.extent[each] = extent[each];
      shape.stride[each] = stride[each];
      shape.box[each] = box[each];
    }
    return encode_tensor_map(map, base, shape);
  };
  if (const char* said = describe(&args.a, a, 2, m, k, kM)) return said;
  if (const char* said = b_mn ? describe(&args.b, b, 2, k, n, kK) : describe(&args.b, b, 2, n, k, kN)) return said;
  if (const char* said = describe(&args.c, c, 4, m, n, kM)) return said;
  Launch how;
  how.grid = dim3((m + kM - 1) / kM, (n + kN - 1) / kN);
  how.threads = 256;
  how.shared_bytes = sizeof(Shared<T>);
  void (*kernel)(Args) = b_mn ? product<T, true, false> : product<T, false, false>;
  if (a_registers) kernel = b_mn ? product<T, true, true> : product<T, false, true>;
  return finished(launch(kernel, how, args));
}

}  // namespace

EXPORT run_product(const void* a, const void* b, void* c, int m, int n, int k, int is_bf16, int b_mn, int a_registers,
                   int bug) {
  if (is_bf16 != 0) {
    return run_all(static_cast<const bf16*>(a), static_cast<const bf16*>(b), static_cast<bf16*>(c), m, n, k, b_mn != 0,
                   a_registers != 0, bug);
  }
  return run_all(static_cast<const f16*>(a), static_cast<const f16*>(b), static_cast<f16*>(c), m, n, k, b_mn != 0,
                 a_registers != 0, bug);
}
