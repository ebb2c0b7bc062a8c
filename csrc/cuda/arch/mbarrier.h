// mbarrier: a barrier in shared memory that also counts the bytes of asynchronous copies. One thread initialises it,
// then mbarrier_init_fence() and a barrier before anybody else uses it. A phase ends when `count` arrivals have come
// and every expected byte has landed; phases alternate in parity, from 0.
#pragma once

#include "dialect.h"

namespace fastattn::arch {

// 8 bytes in shared memory; for these functions alone.
struct alignas(8) Mbarrier {
  uint64_t opaque;
};

// PTX ISA: mbarrier.init.
DEVICE void mbarrier_init(Mbarrier* barrier, int count) {
#ifdef FASTATTN_SIM
  sim::mbarrier_init(shared_address(barrier), count);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
#endif
}

// The memory may be used for something else afterwards. PTX ISA: mbarrier.inval.
DEVICE void mbarrier_invalidate(Mbarrier* barrier) {
#ifdef FASTATTN_SIM
  sim::mbarrier_invalidate(shared_address(barrier));
#else
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Makes initialised barriers known to the asynchronous copies. PTX ISA: membar, fence (fence.mbarrier_init).
DEVICE void mbarrier_init_fence() {
#ifdef FASTATTN_SIM
  sim::mbarrier_init_fence();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// One arrival; what the thread did before is seen by who waits for the phase. PTX ISA: mbarrier.arrive.
DEVICE void mbarrier_arrive(Mbarrier* barrier) {
#ifdef FASTATTN_SIM
  sim::mbarrier_arrive(shared_address(barrier));
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// One arrival, and `bytes` more to land in this phase. PTX ISA: mbarrier.arrive (.expect_tx).
DEVICE void mbarrier_arrive_expect(Mbarrier* barrier, uint32_t bytes) {
#ifdef FASTATTN_SIM
  sim::mbarrier_arrive_expect(shared_address(barrier), bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// `bytes` more to land in this phase, without an arrival. PTX ISA: mbarrier.expect_tx.
DEVICE void mbarrier_expect(Mbarrier* barrier, uint32_t bytes) {
#ifdef FASTATTN_SIM
  sim::mbarrier_expect(shared_address(barrier), bytes);
#else
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Has the phase of this parity ended? May wait a little before it says no. PTX ISA: mbarrier.test_wait, try_wait.
DEVICE bool mbarrier_try_wait(Mbarrier* barrier, uint32_t parity) {
#ifdef FASTATTN_SIM
  return sim::mbarrier_try_wait(shared_address(barrier), parity);
#else
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return done != 0;
#endif
}

// Waits until the phase of this parity has ended. Of a fresh barrier, parity 1 has.
DEVICE void mbarrier_wait(Mbarrier* barrier, uint32_t parity) {
#ifdef FASTATTN_SIM
  sim::mbarrier_wait(shared_address(barrier), parity);
#else
  while (!mbarrier_try_wait(barrier, parity)) {
  }
#endif
}

}  // namespace fastattn::arch
