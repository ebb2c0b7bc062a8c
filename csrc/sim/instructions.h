// What the instructions of csrc/cuda/arch/ do, simulated: each is called by the thread that executes it, with what PTX
// would be given. Shared memory is named by its 32-bit address.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>

#include "cuda_types.h"

namespace fastattn::sim {

// memory.cpp
char* dynamic_shared();
uint32_t shared_address(const void* pointer);

// numbers.h
float exp2_approx(float x);
float log2_approx(float x);
float tanh_approx(float x);
float reciprocal_approx(float x);
float max_nan(float x, float y);
float half_to_float(uint16_t bits);
uint32_t pack(float low, float high, bool bf16);

// barriers.cpp
void barrier_sync(int id, int threads);
void barrier_arrive(int id, int threads);
bool elect_one();
void registers_set(int count, bool grow);

// mbarriers.cpp
void mbarrier_init(uint32_t address, int count);
void mbarrier_invalidate(uint32_t address);
void mbarrier_init_fence();
void mbarrier_arrive(uint32_t address);
void mbarrier_arrive_expect(uint32_t address, uint32_t bytes);
void mbarrier_expect(uint32_t address, uint32_t bytes);
bool mbarrier_try_wait(uint32_t address, uint32_t parity);
void mbarrier_wait(uint32_t address, uint32_t parity);

// shadow.cpp
void fence_proxy_async();
void fence_proxy_async_global();

// copies.cpp
void copy_async(uint32_t shared, const void* global, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);
void copy_async_arrive(uint32_t barrier);
void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier);
void bulk_store(void* global, uint32_t shared, uint32_t bytes, bool add);
void bulk_commit();
void bulk_wait(int pending, bool read_only);

// tensor_map.cpp
struct alignas(64) TensorMap {
  char* base;
  int element, rank, swizzle;  // as arch::Element and arch::Swizzle number them
  uint32_t box[5];
  uint64_t extent[5];
  uint64_t stride[5];
};
static_assert(sizeof(TensorMap) == 128, "as large as CUtensorMap");

constexpr uint64_t kAnyPolicy = 0;

const char* encode_tensor_map(TensorMap* map, const void* base, int element, int rank, const uint64_t* extent,
                              const uint64_t* stride, const uint32_t* box, int swizzle);
void tma_load(uint32_t shared, const TensorMap* map, uint32_t barrier, std::initializer_list<int> at);
void tma_store(const TensorMap* map, uint32_t shared, std::initializer_list<int> at, bool add);

// stores.cpp
void store_global(void* global, const void* value, size_t bytes);

// matrices.cpp
void load_matrix(uint32_t* fragment, uint32_t row, bool transposed);
void store_matrix(uint32_t row, const uint32_t* fragment, bool transposed);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, bool bf16);

// wgmma.cpp; `a` null: behind the descriptor `a_at`
void wgmma_fence();
void wgmma(int n, bool bf16, float* d, const uint32_t* a, uint64_t a_at, bool a_mn_major, uint64_t b_at,
           bool b_mn_major, bool accumulate);
void wgmma_commit();
void wgmma_wait(int pending);

// scheduler.cpp
int load_acquire(const int* global);
void add_release(int* global, int value);

// launch.cpp: runs `body` once a thread of the grid; null, or what went wrong, in words that last until the next call.
const char* launch(dim3 grid, int threads, int shared_bytes, const std::function<void()>& body);

}  // namespace fastattn::sim
