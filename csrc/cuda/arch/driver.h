// The driver's functions, asked for by name: nothing is linked against libcuda. The host's half; the simulator has
// none.
#pragma once

#include <cstdio>

#include "dialect.h"

#ifndef FASTATTN_SIM

namespace fastattn::arch {

// A function that every driver since CUDA 12.0 has; null, and why in `said`, where it does not.
inline void* driver_function(const char* name, char* said, size_t size) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 13000
  constexpr unsigned kSince = 12000;  // CUDA 12.0
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, kSince, cudaEnableDefault, &status);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &status);
#endif
  if (error == cudaSuccess && status == cudaDriverEntryPointSuccess) return found;
  cudaGetLastError();  // not sticky: the next call does not report it again
  std::snprintf(said, size, "the driver has no %s: %s", name,
                error != cudaSuccess ? cudaGetErrorString(error) : "it is older than CUDA 12.0");
  return nullptr;
}

// While it lives, a device is the thread's current one; afterwards what was before: no other device gets a context that
// had none. `refused`: null, or why it is not.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    using Get = CUresult (*)(CUcontext*);
    using Set = CUresult (*)(CUcontext);
    static char said[160];  // written once, with the two below
    static const Get get = reinterpret_cast<Get>(driver_function("cuCtxGetCurrent", said, sizeof said));
    static const Set set = reinterpret_cast<Set>(driver_function("cuCtxSetCurrent", said, sizeof said));
    if (get == nullptr || set == nullptr) {
      refused = said;
      return;
    }
    int now = -1;
    get(&before_);
    if (before_ != nullptr && cudaGetDevice(&now) == cudaSuccess && now == device) return;
    const cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) {
      refused = cudaGetErrorString(error);
      return;
    }
    put_back_ = set;
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() {
    if (put_back_ != nullptr) put_back_(before_);
  }

  const char* refused = nullptr;

 private:
  CUcontext before_ = nullptr;
  CUresult (*put_back_)(CUcontext) = nullptr;
};

}  // namespace fastattn::arch

#endif
