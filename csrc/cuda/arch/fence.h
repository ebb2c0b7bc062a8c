// Fences: which accesses come before which others.
#pragma once

#include "dialect.h"

namespace fastattn::arch {

// Between ordinary accesses to shared memory (stores, stmatrix, cp.async) and those of the asynchronous proxy (TMA,
// wgmma) to the same bytes: by the thread that wrote, before the barrier after which the others go on.
// PTX ISA: membar, fence (fence.proxy.async).
DEVICE void fence_proxy_async() {
#ifdef FASTATTN_SIM
  sim::fence_proxy_async();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The same for global memory: before a TMA load reads what ordinary stores wrote, or the other way around.
DEVICE void fence_proxy_async_global() {
#ifdef FASTATTN_SIM
  sim::fence_proxy_async_global();
#else
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

}  // namespace fastattn::arch
