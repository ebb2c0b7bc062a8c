// Global memory beyond plain loads and stores: counters that blocks share.
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
