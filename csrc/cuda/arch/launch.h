// From the host into a kernel, on the GPU or in the simulator.
#pragma once

#include <cstdio>

#include "dialect.h"

namespace fastattn::arch {

struct Launch {
  dim3 grid;
  int threads = 0;         // a block's
  int shared_bytes = 0;    // dynamic shared memory, up to 227 KB
  void* stream = nullptr;  // cudaStream_t
  bool overlap = false;    // may start while the kernel before it ends: it calls wait_for_dependencies() first
};

#ifdef FASTATTN_SIM

// Null, or what went wrong, in words that last until the next call. The simulator runs the kernel before it returns.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), const Launch& how, const Arguments&... arguments) {
  return sim::launch(how.grid, how.threads, how.shared_bytes, [&] { kernel(arguments...); });
}

#else

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), const Launch& how, const Arguments&... arguments) {
  static thread_local char said[200];
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes);
  if (error == cudaSuccess) {
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = how.grid;
    config.blockDim = dim3(how.threads);
    config.dynamicSmemBytes = how.shared_bytes;
    config.stream = static_cast<cudaStream_t>(how.stream);
    config.attrs = &overlap;
    config.numAttrs = how.overlap ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // not sticky: the next launch does not report it again
  std::snprintf(said, sizeof said, "launch of grid (%u, %u, %u), %d threads, %d bytes of shared memory: %s", how.grid.x,
                how.grid.y, how.grid.z, how.threads, how.shared_bytes, cudaGetErrorString(error));
  return said;
}

#endif

}  // namespace fastattn::arch
