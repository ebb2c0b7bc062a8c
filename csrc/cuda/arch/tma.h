// TMA: the copy engine, which moves boxes of a tensor (2-D to 5-D, described by a TensorMap) and plain runs of bytes.
// One thread asks for the whole copy. Loads report their bytes to an mbarrier; stores and reductions are waited for in
// groups, by the thread that asked.
//
// Coordinates count elements, the innermost dimension first, and may lie outside the tensor: such elements are loaded
// as zeros (and counted as bytes), and not stored. Only loads may start before the tensor: a store or an addition at
// negative coordinates is an illegal instruction, which ends the CUDA context (measured on an H200 in November 2026,
// at -8, -3, -1, for 4-D and 5-D stores and for additions; PTX's manual does not say so).
//
// Shared addresses are aligned to 128 bytes, to 1024 where a tile begins with a whole pattern of the swizzle; a box
// that begins within a pattern is swizzled by its addresses (confirmed there, at 128, 384 and 896 bytes).
#pragma once

#include "mbarrier.h"
#include "tensor_map.h"

namespace fastattn::arch {

// How long L2 should keep what a copy touches. PTX ISA: createpolicy.
DEVICE uint64_t policy_evict_first() {
#ifdef FASTATTN_SIM
  return sim::kAnyPolicy;
#else
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  return policy;
#endif
}

DEVICE uint64_t policy_evict_last() {
#ifdef FASTATTN_SIM
  return sim::kAnyPolicy;
#else
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0;" : "=l"(policy));
  return policy;
#endif
}

// Fetches the description itself ahead of its first use. PTX ISA: prefetch, prefetchu (.tensormap).
DEVICE void prefetch_map(const TensorMap* map) {
#ifdef FASTATTN_SIM
  (void)map;
#else
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// A box into shared memory; its bytes arrive at the barrier. PTX ISA: cp.async.bulk.tensor.
DEVICE void tma_load(void* shared, const TensorMap* map, Mbarrier* barrier, int c0, int c1) {
#ifdef FASTATTN_SIM
  sim::tma_load(shared_address(shared), map, shared_address(barrier), {c0, c1});
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
      : "memory");
#endif
}

DEVICE void tma_load(void* shared, const TensorMap* map, Mbarrier* barrier, int c0, int c1, int c2) {
#ifdef FASTATTN_SIM
  sim::tma_load(shared_address(shared), map, shared_address(barrier), {c0, c1, c2});
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
#endif
}

DEVICE void tma_load(void* shared, const TensorMap* map, Mbarrier* barrier, int c0, int c1, int c2, int c3) {
#ifdef FASTATTN_SIM
  sim::tma_load(shared_address(shared), map, shared_address(barrier), {c0, c1, c2, c3});
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
#endif
}

DEVICE void tma_load(void* shared, const TensorMap* map, Mbarrier* barrier, int c0, int c1, int c2, int c3, int c4) {
#ifdef FASTATTN_SIM
  sim::tma_load(shared_address(shared), map, shared_address(barrier), {c0, c1, c2, c3, c4});
#else
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
#endif
}

// The 4-D load, with an L2 policy.
DEVICE void tma_load_hinted(void* shared, const TensorMap* map, Mbarrier* barrier, uint64_t policy, int c0, int c1,
                            int c2, int c3) {
#ifdef FASTATTN_SIM
  (void)policy;
  sim::tma_load(shared_address(shared), map, shared_address(barrier), {c0, c1, c2, c3});
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy)
      : "memory");
#endif
}

// A box out of shared memory, once fence_proxy_async() has followed what wrote it; no coordinate is negative. PTX ISA:
// cp.async.bulk.tensor.
DEVICE void tma_store(const TensorMap* map, const void* shared, int c0, int c1, int c2, int c3) {
#ifdef FASTATTN_SIM
  sim::tma_store(map, shared_address(shared), {c0, c1, c2, c3}, false);
#else
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
#endif
}

DEVICE void tma_store(const TensorMap* map, const void* shared, int c0, int c1, int c2, int c3, int c4) {
#ifdef FASTATTN_SIM
  sim::tma_store(map, shared_address(shared), {c0, c1, c2, c3, c4}, false);
#else
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
               "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
#endif
}

// Adds the box to what is there, element by element, in no order; no coordinate is negative. PTX ISA:
// cp.reduce.async.bulk.tensor.
DEVICE void tma_add(const TensorMap* map, const void* shared, int c0, int c1, int c2, int c3) {
#ifdef FASTATTN_SIM
  sim::tma_store(map, shared_address(shared), {c0, c1, c2, c3}, true);
#else
  asm volatile(
      "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
#endif
}

// A run of bytes into shared memory; addresses and size are multiples of 16. PTX ISA: cp.async.bulk.
DEVICE void bulk_load(void* shared, const void* global, uint32_t bytes, Mbarrier* barrier) {
#ifdef FASTATTN_SIM
  sim::bulk_load(shared_address(shared), global, bytes, shared_address(barrier));
#else
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}

// The way back. PTX ISA: cp.async.bulk.
DEVICE void bulk_store(void* global, const void* shared, uint32_t bytes) {
#ifdef FASTATTN_SIM
  sim::bulk_store(global, shared_address(shared), bytes, false);
#else
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
#endif
}

// Adds float32 numbers to those in global memory, in no order. PTX ISA: cp.reduce.async.bulk.
DEVICE void bulk_add(float* global, const float* shared, uint32_t bytes) {
#ifdef FASTATTN_SIM
  sim::bulk_store(global, shared_address(shared), bytes, true);
#else
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
#endif
}

// The thread's stores and additions since the last call are a group. PTX ISA: cp.async.bulk.commit_group.
DEVICE void bulk_commit() {
#ifdef FASTATTN_SIM
  sim::bulk_commit();
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Waits until at most PENDING of the thread's groups have yet to read shared memory, which may be overwritten then.
// PTX ISA: cp.async.bulk.wait_group (.read).
template <int PENDING>
DEVICE void bulk_wait_read() {
#ifdef FASTATTN_SIM
  sim::bulk_wait(PENDING, true);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
#endif
}

// Waits until at most PENDING groups have yet to be complete: what they wrote may be announced to others.
template <int PENDING>
DEVICE void bulk_wait() {
#ifdef FASTATTN_SIM
  sim::bulk_wait(PENDING, false);
#else
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

}  // namespace fastattn::arch
