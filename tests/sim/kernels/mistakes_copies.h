// The small mistakes (mistakes.cu) with asynchronous copies, and what all of them share.
#pragma once

#include "harness.h"

namespace {

constexpr int kTileBytes = 8192;

struct alignas(1024) Shared {
  char tile[2 * kTileBytes];
  float row[256];
  Mbarrier barrier;
  int count;
};

DEVICE Shared& memory() { return *reinterpret_cast<Shared*>(dynamic_shared()); }
DEVICE bool first() { return threadIdx.x == 0; }

DEVICE void ready(int arrivals = 1) {
  if (first()) {
    mbarrier_init(&memory().barrier, arrivals);
    mbarrier_init_fence();
  }
  __syncthreads();
}

__global__ void cp_async_not_waited_for(float* out) {
  copy_async(&memory().row[threadIdx.x * 4 % 256], out, true);
  copy_async_commit();
}

__global__ void cp_async_not_committed(float* out) { copy_async(&memory().row[threadIdx.x * 4 % 256], out, true); }

__global__ void cp_async_read_before_the_wait(float* out) {
  if (threadIdx.x >= 32) return;
  copy_async(&memory().row[threadIdx.x * 4], out, true);
  copy_async_commit();
  out[128 + threadIdx.x] = memory().row[threadIdx.x * 4];
  copy_async_wait<0>();
}

__global__ void cp_async_read_without_a_barrier(float* out) {
  copy_async(&memory().row[threadIdx.x * 4 % 128], out, true);
  copy_async_commit();
  copy_async_wait<0>();
  out[threadIdx.x] = memory().row[threadIdx.x];
}

__global__ void cp_async_that_an_mbarrier_counts_unobserved(float* out) {
  ready(128);
  if (threadIdx.x < 64) copy_async(&memory().row[threadIdx.x * 4], out, true);
  copy_async_arrive(&memory().barrier);
}

__global__ void cp_async_misaligned(float* out) {
  copy_async(&memory().row[0], reinterpret_cast<char*>(out) + 4, true);
}

__global__ void a_store_of_16_bytes_misaligned(float* out) {
  store_global(reinterpret_cast<char*>(out) + 8, make_uint4(0, 0, 0, 0));
}

__global__ void cp_async_then_wgmma_without_a_fence(float* out) {
  for (int i = 0; i < 4; ++i) copy_async(memory().tile + (threadIdx.x + 128 * i) * 16, out, true);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  float d[32];
  wgmma_fence();
  wgmma_ss<64, bf16>(d, descriptor_128(memory().tile), descriptor_128(memory().tile), false);
  wgmma_commit();
  wgmma_wait<0>();
  out[threadIdx.x] = d[0];
}

__global__ void a_store_after_the_fence(float* out) {
  memory().row[threadIdx.x] = 1.0f;
  fence_proxy_async();
  memory().row[threadIdx.x] = 2.0f;
  __syncthreads();
  if (!first()) return;
  bulk_store(out, memory().row, 512);
  bulk_commit();
  bulk_wait<0>();
}

__global__ void a_bulk_store_overwritten(float* out) {
  memory().row[threadIdx.x] = 1.0f;
  fence_proxy_async();
  __syncthreads();
  if (!first()) return;
  bulk_store(out, memory().row, 512);
  bulk_commit();
  memory().row[0] = 2.0f;
  bulk_wait<0>();
}

__global__ void a_bulk_store_not_committed(float* out) {
  memory().row[threadIdx.x] = 1.0f;
  fence_proxy_async();
  __syncthreads();
  if (first()) bulk_store(out, memory().row, 512);
}

__global__ void a_bulk_load_nobody_waits_for(float* out) {
  ready();
  if (!first()) return;
  mbarrier_arrive_expect(&memory().barrier, 512);
  bulk_load(memory().row, out, 512, &memory().barrier);
}

__global__ void a_load_over_an_mbarrier(float* out) {
  ready();
  if (!first()) return;
  mbarrier_arrive_expect(&memory().barrier, 512);
  bulk_load(reinterpret_cast<char*>(&memory().barrier) - 256, out, 512, &memory().barrier);
  mbarrier_wait(&memory().barrier, 0);
}

__global__ void a_load_over_what_was_just_stored(float* out) {
  ready();
  memory().row[threadIdx.x] = 1.0f;
  __syncthreads();
  if (!first()) return;
  mbarrier_arrive_expect(&memory().barrier, 512);
  bulk_load(memory().row, out, 512, &memory().barrier);
  mbarrier_wait(&memory().barrier, 0);
}

}  // namespace
