// Threads that wait for one another: the block's sixteen named barriers, and the warp's elected thread.
#pragma once

#include "dialect.h"

namespace fastattn::arch {

// Waits until `threads` threads (a multiple of 32, the same in every call of a phase) have arrived at barrier `id`, 0
// to 15; __syncthreads() is barrier 0 with all of them. Orders shared and global memory. PTX ISA: bar, barrier.
DEVICE void barrier_sync(int id, int threads) {
#ifdef FASTATTN_SIM
  sim::barrier_sync(id, threads);
#else
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Counts as arrived without waiting.
DEVICE void barrier_arrive(int id, int threads) {
#ifdef FASTATTN_SIM
  sim::barrier_arrive(id, threads);
#else
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// True in one thread of the warp, the same one each time; all 32 must call. PTX ISA: elect.sync.
DEVICE bool elect_one() {
#ifdef FASTATTN_SIM
  return sim::elect_one();
#else
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(elected));
  return elected != 0;
#endif
}

}  // namespace fastattn::arch
