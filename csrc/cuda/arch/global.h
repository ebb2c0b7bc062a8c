// Global memory beyond plain loads and stores: counters that blocks share, and stores that stay one instruction.
#pragma once

#include "dialect.h"

namespace fastattn::arch {

// Sees what was written before the release that wrote the value. PTX ISA: ld (.acquire).
DEVICE int load_acquire(const int* global) {
#ifdef FASTATTN_SIM
  return sim::load_acquire(global);
#else
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(global) : "memory");
  return value;
#endif
}

// Adds after all that the thread wrote before. PTX ISA: red (.release).
DEVICE void add_release(int* global, int value) {
#ifdef FASTATTN_SIM
  sim::add_release(global, value);
#else
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(global), "r"(value) : "memory");
#endif
}

// 4, 8 or 16 bytes of each thread, aligned to their size. An assignment of 16 bytes may become four instructions of 4
// (nvcc 13.0 makes that of some): a warp's lanes then write 4 of every 16 bytes, and each 32-byte sector goes to L2
// four times. PTX ISA: st (.v2, .v4).
DEVICE void store_global(float* global, float value) {
#ifdef FASTATTN_SIM
  sim::store_global(global, &value, sizeof value);
#else
  asm volatile("st.global.f32 [%0], %1;" ::"l"(global), "f"(value) : "memory");
#endif
}

DEVICE void store_global(float* global, float2 value) {
#ifdef FASTATTN_SIM
  sim::store_global(global, &value, sizeof value);
#else
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(global), "f"(value.x), "f"(value.y) : "memory");
#endif
}

DEVICE void store_global(void* global, uint4 value) {
#ifdef FASTATTN_SIM
  sim::store_global(global, &value, sizeof value);
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
#endif
}

// Lets the next kernel of the stream start while this one ends. PTX ISA: griddepcontrol.
DEVICE void launch_dependents() {
#ifndef FASTATTN_SIM
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until what the kernel before wrote can be read.
DEVICE void wait_for_dependencies() {
#ifndef FASTATTN_SIM
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace fastattn::arch
