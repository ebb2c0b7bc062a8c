// Barriers, mbarriers, fences, registers and counters that blocks share.
#include "harness.h"

namespace {

constexpr int kTurns = 8;

struct alignas(128) Shared {
  int order;
  alignas(16) int log[2 * kTurns];
  alignas(16) int row[4];
  Mbarrier full, empty;
};

// Two warpgroups take turns through two named barriers, as in ping-pong; `out` is who came when.
__global__ void ping_pong(int* out) {
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int group = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  if (threadIdx.x == 0) shared.order = 0;
  __syncthreads();
  if (group == 1) barrier_arrive(1, 2 * kWarpgroup);  // group 0 goes first
  for (int turn = 0; turn < kTurns; ++turn) {
    barrier_sync(1 + group, 2 * kWarpgroup);
    if (thread == 0) shared.log[shared.order++] = group;
    if (group == 0 || turn + 1 < kTurns) barrier_arrive(2 - group, 2 * kWarpgroup);
  }
  __syncthreads();
  if (threadIdx.x < 2 * kTurns) out[threadIdx.x] = shared.log[threadIdx.x];
}

// One thread of each warp, the same one twice.
__global__ void elect(int* out) {
  const unsigned first = __ballot_sync(0xffffffffu, elect_one()), again = __ballot_sync(0xffffffffu, elect_one());
  if (threadIdx.x % kWarp == 0) out[threadIdx.x / kWarp] = __popc(first) + 100 * static_cast<int>(first != again);
}

// Warp 0 hands numbers to warp 1 through one slot.
__global__ void hand_over(int* out) {
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  if (threadIdx.x == 0) {
    mbarrier_init(&shared.full, kWarp + 1);
    mbarrier_init(&shared.empty, kWarp);
    mbarrier_init_fence();
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  for (int turn = 0; turn < kTurns; ++turn) {
    if (threadIdx.x < kWarp) {
      while (!mbarrier_try_wait(&shared.empty, (turn & 1) ^ 1)) {
      }
      if (lane < 4) shared.row[lane] = 10 * turn + lane;
      if (lane == 0) {
        mbarrier_expect(&shared.full, 16);
        mbarrier_arrive(&shared.full);
        // Bytes that land count as well: here the row's own, copied onto itself a turn later by nobody else.
        fence_proxy_async();
        bulk_load(shared.log, out + 4 * kTurns, 16, &shared.full);
      }
      mbarrier_arrive(&shared.full);
    } else {
      mbarrier_wait(&shared.full, turn & 1);
      if (lane < 4) out[4 * turn + lane] = shared.row[lane] + shared.log[lane];
      fence_proxy_async();
      mbarrier_arrive(&shared.empty);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_invalidate(&shared.full);
    mbarrier_init(&shared.full, 1);
    mbarrier_arrive(&shared.full);
    mbarrier_wait(&shared.full, 0);
  }
}

// Registers go from the first warpgroup to the two others: each starts with 168, which is all that there are.
__global__ void __launch_bounds__(3 * kWarpgroup, 1) registers(int* out) {
  if (threadIdx.x < kWarpgroup) {
    registers_shrink_to<40>();
  } else {
    registers_grow_to<232>();
  }
  out[threadIdx.x] = static_cast<int>(threadIdx.x);
}

// Blocks one after the other, through a counter in out[0].
__global__ void in_turn(int* out) {
  const int block = blockIdx.x;
  if (threadIdx.x == 0) {
    while (load_acquire(out) != block) {
    }
    out[1 + block] = block == 0 ? 1 : 2 * out[block];
    add_release(out, 1);
  }
}

// What ordinary stores left in global memory, by the copy engine.
__global__ void global_fence(int* out) {
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  if (threadIdx.x == 0) {
    mbarrier_init(&shared.full, 1);
    mbarrier_init_fence();
    for (int i = 0; i < 4; ++i) out[i] = 7 * i;
    fence_proxy_async_global();
    mbarrier_arrive_expect(&shared.full, 16);
    bulk_load(shared.row, out, 16, &shared.full);
    mbarrier_wait(&shared.full, 0);
    for (int i = 0; i < 4; ++i) out[4 + i] = shared.row[i] + 1;
  }
}

// Swizzled tiles want it at a multiple of 1024.
__global__ void start_of_shared(int* out) { *out = static_cast<int>(shared_address(dynamic_shared()) % 1024); }

// The second of two launches waits for what the first one writes.
__global__ void chained(int* out, int add) {
  wait_for_dependencies();
  launch_dependents();
  out[threadIdx.x] += add;
}

}  // namespace

EXPORT run_barriers(int which, void* memory) {
  int* out = static_cast<int*>(memory);
  constexpr int kShared = sizeof(Shared);
  if (which == 0) return run(ping_pong, 1, 2 * kWarpgroup, kShared, out);
  if (which == 1) return run(elect, 1, 128, 0, out);
  if (which == 2) return run(hand_over, 1, 2 * kWarp, kShared, out);
  if (which == 3) return run(registers, 1, 3 * kWarpgroup, 0, out);
  if (which == 4) return run(in_turn, 12, kWarp, 0, out);
  if (which == 5) return run(global_fence, 1, kWarp, kShared, out);
  if (which == 6) return run(start_of_shared, 1, kWarp, kShared, out);
  Launch how;
  how.threads = kWarp;
  how.overlap = true;
  if (const char* said = launch(chained, how, out, 1)) return said;
  return finished(launch(chained, how, out, 2));
}
