// What every wrapper starts from: CUDA's own words (nvcc's, or the simulator's under FASTATTN_SIM), the element types
// of the matrix instructions, and where the block's shared memory is.
//
// Each function of csrc/cuda/arch/ is one instruction. Its two halves stand side by side: the PTX that nvcc compiles,
// and the call that the simulator (csrc/sim/) answers. A comment names the instruction by its title in NVIDIA's PTX
// ISA.
#pragma once

#include <cstdint>

#ifdef FASTATTN_SIM
#include "../../sim/cuda_words.h"
#include "../../sim/instructions.h"
#else
#include <cuda.h>
#include <cuda_runtime.h>
#endif

#define DEVICE __device__ __forceinline__

namespace fastattn::arch {

constexpr int kWarp = 32;        // threads
constexpr int kWarpgroup = 128;  // threads: what a wgmma takes

// Two bytes in memory; the type says which matrix instruction reads them.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class A, class B>
constexpr bool same_type = false;
template <class A>
constexpr bool same_type<A, A> = true;

// The block's dynamic shared memory, aligned to 1024 bytes: the one place for what threads share (no __shared__
// variables).
DEVICE char* dynamic_shared() {
#ifdef FASTATTN_SIM
  return sim::dynamic_shared();
#else
  extern __shared__ __align__(1024) char fastattn_dynamic_shared[];
  return fastattn_dynamic_shared;
#endif
}

// The 32-bit address that instructions take for shared memory. PTX ISA: cvta.
DEVICE uint32_t shared_address(const void* pointer) {
#ifdef FASTATTN_SIM
  return sim::shared_address(pointer);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

}  // namespace fastattn::arch
