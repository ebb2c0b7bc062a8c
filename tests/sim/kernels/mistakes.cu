// Small kernels, one mistake each: what the simulator must say of them is in test_mistakes.py. For the simulator alone.
#include "mistakes_copies.h"

namespace {

using Kernel = void (*)(float*);

// Warps --------------------------------------------------------------------------------------------------------------

__global__ void lanes_take_different_ways(float* out) {
  float x = out[threadIdx.x];
  if (threadIdx.x < 16) {
    x = __shfl_xor_sync(0xffffffffu, x, 1);
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = x;
}

__global__ void a_lane_leaves_before_the_others_shuffle(float* out) {
  if (threadIdx.x == 7) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, out[threadIdx.x], 1);
}

__global__ void a_partial_mask(float* out) { out[threadIdx.x] = __shfl_sync(0xffffu, out[threadIdx.x], 0); }

__global__ void a_warp_skips_the_wgmma(float* out) {
  float d[32];
  wgmma_fence();
  if (threadIdx.x >= 32) wgmma_ss<64, bf16>(d, descriptor_128(memory().tile), descriptor_128(memory().tile), false);
  wgmma_commit();
  wgmma_wait<0>();
  out[threadIdx.x] = d[0];
}

__global__ void a_warpgroup_with_different_descriptors(float* out) {
  float d[32];
  reinterpret_cast<float4*>(memory().tile)[threadIdx.x] = make_float4(0, 0, 0, 0);
  fence_proxy_async();
  __syncthreads();
  wgmma_fence();
  const uint64_t at = descriptor_128(memory().tile);
  wgmma_ss<64, bf16>(d, at, at + (threadIdx.x == 5 ? 2 : 0), false);
  out[threadIdx.x] = d[0];
}

__global__ void an_accumulator_read_in_flight(float* out) {
  float d[32];
  for (int i = 0; i < 4; ++i) reinterpret_cast<float4*>(memory().tile)[threadIdx.x + 128 * i] = make_float4(0, 0, 0, 0);
  fence_proxy_async();
  __syncthreads();
  wgmma_fence();
  wgmma_ss<64, bf16>(d, descriptor_128(memory().tile), descriptor_128(memory().tile), false);
  wgmma_commit();
  out[threadIdx.x] = d[0];
  wgmma_wait<0>();
}

__global__ void a_tile_that_starts_within_a_pattern(float* out) {
  float d[32];
  for (int i = 0; i < 5; ++i) reinterpret_cast<float4*>(memory().tile)[threadIdx.x + 128 * i] = make_float4(0, 0, 0, 0);
  fence_proxy_async();
  __syncthreads();
  wgmma_fence();
  const uint64_t at = descriptor_128(memory().tile + 128);
  wgmma_ss<64, bf16>(d, at, at, false);
  wgmma_commit();
  wgmma_wait<0>();
  out[threadIdx.x] = d[0];
}

// Barriers -----------------------------------------------------------------------------------------------------------

__global__ void half_the_block_syncs(float*) {
  if (threadIdx.x < 64) __syncthreads();
}

__global__ void different_counts_at_a_barrier(float*) { barrier_sync(3, threadIdx.x < 64 ? 128 : 64); }

__global__ void a_barrier_that_does_not_exist(float*) { barrier_sync(16, 128); }

__global__ void a_barrier_of_part_of_a_warp(float*) { barrier_sync(1, 48); }

__global__ void one_side_forgets_to_arrive(float*) {
  if (threadIdx.x < 64) {
    barrier_sync(1, 128);
    barrier_arrive(2, 128);
  } else {
    barrier_sync(2, 128);
    barrier_arrive(1, 128);
  }
}

__global__ void an_arrival_that_nobody_waits_for(float*) {
  if (threadIdx.x < 64) barrier_arrive(1, 128);
}

__global__ void an_mbarrier_that_nobody_initialised(float*) {
  if (first()) mbarrier_arrive(&memory().barrier);
}

__global__ void an_mbarrier_used_before_a_barrier(float*) {
  if (first()) {
    mbarrier_init(&memory().barrier, 1);
    mbarrier_init_fence();
    mbarrier_arrive(&memory().barrier);
  } else {
    __nanosleep(100);
    __nanosleep(100);
    mbarrier_wait(&memory().barrier, 0);
  }
}

__global__ void one_arrival_too_few(float*) {
  ready(33);
  if (threadIdx.x < 32) mbarrier_arrive(&memory().barrier);
  mbarrier_wait(&memory().barrier, 0);
}

__global__ void one_arrival_too_many(float*) {
  ready(1);
  if (first()) {
    mbarrier_arrive_expect(&memory().barrier, 16);
    mbarrier_arrive(&memory().barrier);
  }
}

__global__ void the_wrong_parity(float*) {
  ready(128);
  mbarrier_arrive(&memory().barrier);
  mbarrier_wait(&memory().barrier, 0);
  mbarrier_wait(&memory().barrier, 1);
}

__global__ void polling_what_never_comes(float*) {
  ready(2);
  while (!mbarrier_try_wait(&memory().barrier, 0)) {
  }
}

__global__ void more_registers_than_there_are(float*) { registers_grow_to<256>(); }

__global__ void registers_that_grow_to_fewer(float*) {
  registers_grow_to<168>();
  __syncthreads();
  registers_grow_to<40>();
}

__global__ void more_bytes_than_a_phase_counts(float*) {
  ready();
  if (first()) mbarrier_expect(&memory().barrier, 1 << 20);
}

__global__ void registers_by_one_warp(float*) {
  if (threadIdx.x < 32) registers_shrink_to<40>();
}

// Shared memory ------------------------------------------------------------------------------------------------------

__global__ void a_read_of_what_nobody_wrote(float* out) { out[threadIdx.x] = memory().row[threadIdx.x]; }

__global__ void a_store_without_a_barrier(float* out) {
  memory().row[threadIdx.x] = 1.0f;
  out[threadIdx.x] = memory().row[threadIdx.x ^ 32];
}

__global__ void two_stores_to_one_place(float*) { memory().row[threadIdx.x / 64] = static_cast<float>(threadIdx.x); }

__global__ void a_store_over_what_another_still_reads(float* out) {
  memory().row[threadIdx.x] = 1.0f;
  __syncthreads();
  const float x = memory().row[127 - threadIdx.x];
  memory().row[threadIdx.x] = 2.0f;
  out[threadIdx.x] = x;
}

__global__ void no_syncwarp(float* out) {
  memory().row[threadIdx.x] = 1.0f;
  out[threadIdx.x] = memory().row[threadIdx.x ^ 1];
}

__global__ void a_load_past_the_end(float* out) { out[0] = memory().row[threadIdx.x + sizeof(Shared) / 4]; }

__global__ void a_store_before_the_start(float*) { memory().row[static_cast<int>(threadIdx.x) - 4200] = 0.0f; }

__global__ void ldmatrix_misaligned(float* out) {
  uint32_t fragment[4];
  reinterpret_cast<float4*>(memory().tile)[threadIdx.x] = make_float4(0, 0, 0, 0);
  __syncwarp();
  load_matrix_x4(fragment, memory().tile + threadIdx.x * 16 + (threadIdx.x == 9 ? 4 : 0));
  out[threadIdx.x] = static_cast<float>(fragment[0]);
}

__global__ void stmatrix_out_of_bounds(float*) {
  const uint32_t fragment[4] = {1, 2, 3, 4};
  store_matrix_x4(memory().tile + (threadIdx.x == 30 ? sizeof(Shared) - 8 : threadIdx.x * 16), fragment);
}

__global__ void a_counter_without_atomics(float*) {
  if (first()) memory().count = 0;
  __syncthreads();
  memory().count += 1;
}

__global__ void a_counter_with_atomics_is_fine(float* out) {
  if (first()) memory().count = 0;
  __syncthreads();
  atomicAdd(&memory().count, 1);
  __syncthreads();
  out[threadIdx.x] = static_cast<float>(memory().count);
}

__global__ void bytes_beside_one_another_are_fine(float* out) {
  memory().tile[threadIdx.x] = static_cast<char>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = memory().tile[127 - threadIdx.x];
}

// Launches -----------------------------------------------------------------------------------------------------------

__global__ void nothing(float*) {}

struct Row {
  const char* name;
  Kernel kernel;
};
#define ROW(name) {#name, name}
constexpr Row kRows[] = {
    ROW(lanes_take_different_ways),
    ROW(a_lane_leaves_before_the_others_shuffle),
    ROW(a_partial_mask),
    ROW(a_warp_skips_the_wgmma),
    ROW(a_warpgroup_with_different_descriptors),
    ROW(an_accumulator_read_in_flight),
    ROW(a_tile_that_starts_within_a_pattern),
    ROW(half_the_block_syncs),
    ROW(different_counts_at_a_barrier),
    ROW(a_barrier_that_does_not_exist),
    ROW(a_barrier_of_part_of_a_warp),
    ROW(one_side_forgets_to_arrive),
    ROW(an_arrival_that_nobody_waits_for),
    ROW(an_mbarrier_that_nobody_initialised),
    ROW(an_mbarrier_used_before_a_barrier),
    ROW(one_arrival_too_few),
    ROW(one_arrival_too_many),
    ROW(the_wrong_parity),
    ROW(polling_what_never_comes),
    ROW(more_registers_than_there_are),
    ROW(registers_that_grow_to_fewer),
    ROW(more_bytes_than_a_phase_counts),
    ROW(registers_by_one_warp),
    ROW(a_read_of_what_nobody_wrote),
    ROW(a_store_without_a_barrier),
    ROW(two_stores_to_one_place),
    ROW(a_store_over_what_another_still_reads),
    ROW(no_syncwarp),
    ROW(a_load_past_the_end),
    ROW(a_store_before_the_start),
    ROW(ldmatrix_misaligned),
    ROW(stmatrix_out_of_bounds),
    ROW(a_counter_without_atomics),
    ROW(a_counter_with_atomics_is_fine),
    ROW(bytes_beside_one_another_are_fine),
    ROW(cp_async_not_waited_for),
    ROW(cp_async_not_committed),
    ROW(cp_async_read_before_the_wait),
    ROW(cp_async_read_without_a_barrier),
    ROW(cp_async_misaligned),
    ROW(a_store_of_16_bytes_misaligned),
    ROW(cp_async_that_an_mbarrier_counts_unobserved),
    ROW(cp_async_then_wgmma_without_a_fence),
    ROW(a_store_after_the_fence),
    ROW(a_bulk_store_overwritten),
    ROW(a_bulk_store_not_committed),
    ROW(a_bulk_load_nobody_waits_for),
    ROW(a_load_over_an_mbarrier),
    ROW(a_load_over_what_was_just_stored),
    ROW(nothing),
};

}  // namespace

// The kernel of that name, one block of 128 threads, or another launch.
EXPORT run_mistakes(const char* name, float* out, int grid_y, int threads, int shared_bytes) {
  for (const Row& row : kRows) {
    if (strcmp(row.name, name) != 0) continue;
    Launch how;
    how.grid = dim3(1, static_cast<unsigned>(grid_y));
    how.threads = threads;
    how.shared_bytes = shared_bytes < 0 ? static_cast<int>(sizeof(Shared)) : shared_bytes;
    return launch(row.kernel, how, out);
  }
  return "no kernel of this name";
}
