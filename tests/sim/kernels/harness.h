// What a test's file of kernels exports: run_<name>(...) -> null or what went wrong, on the GPU once it has ended.
#pragma once

#include "../../../csrc/cuda/arch/arch.h"

#define EXPORT extern "C" __attribute__((visibility("default"))) const char*

using namespace fastattn::arch;

inline const char* finished(const char* said) {
#ifndef FASTATTN_SIM
  if (said == nullptr) {
    const cudaError_t error = cudaDeviceSynchronize();
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
#endif
  return said;
}

template <class... Parameters, class... Arguments>
const char* run(void (*kernel)(Parameters...), unsigned blocks, int threads, int shared_bytes,
                const Arguments&... arguments) {
  Launch how;
  how.grid = dim3(blocks);
  how.threads = threads;
  how.shared_bytes = shared_bytes;
  return finished(launch(kernel, how, arguments...));
}

// A kernel's mistakes are chosen at run time in the simulator; for the GPU it is compiled without any.
#ifdef FASTATTN_SIM
#define BUG_OF(args) ((args).bug)
#else
#define BUG_OF(args) 0
#endif
