// Copies of 16 bytes by each thread, asynchronous since sm_80, in groups that the thread waits for.
#pragma once

#include "mbarrier.h"

namespace fastattn::arch {

// 16 bytes from global to shared memory, both aligned to 16; zeros where `valid` is false, and nothing is read then.
// PTX ISA: cp.async.
DEVICE void copy_async(void* shared, const void* global, bool valid) {
#ifdef FASTATTN_SIM
  sim::copy_async(shared_address(shared), global, valid);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#endif
}

// The thread's copies since the last call are a group. PTX ISA: cp.async.commit_group.
DEVICE void copy_async_commit() {
#ifdef FASTATTN_SIM
  sim::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most PENDING of the thread's groups are in flight. The other threads' copies want a barrier after it.
// PTX ISA: cp.async.wait_group.
template <int PENDING>
DEVICE void copy_async_wait() {
#ifdef FASTATTN_SIM
  sim::copy_async_wait(PENDING);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// Arrives at the barrier, which counts this thread, once all its copies so far have landed.
// PTX ISA: cp.async.mbarrier.arrive (.noinc).
DEVICE void copy_async_arrive(Mbarrier* barrier) {
#ifdef FASTATTN_SIM
  sim::copy_async_arrive(shared_address(barrier));
#else
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

}  // namespace fastattn::arch
