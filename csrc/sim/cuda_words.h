// CUDA's words for a C++ compiler: with this header a .cu file is ordinary C++ whose kernels run in the simulator.
//
// Left out on purpose: __shared__ (a block's memory is dynamic_shared()), partial masks of the warp functions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_types.h"
#include "threads.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)

#define threadIdx (fastattn::sim::thread_index())
#define blockIdx (fastattn::sim::block_index())
#define blockDim (fastattn::sim::block_size())
#define gridDim (fastattn::sim::grid_size())

using std::max;
using std::min;

inline void __syncthreads() { fastattn::sim::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { fastattn::sim::sync_warp(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { fastattn::sim::let_others_run("__nanosleep"); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  fastattn::sim::shuffle(mask, &value, sizeof value, lane & 31, "__shfl_sync");
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  fastattn::sim::shuffle(mask, &value, sizeof value, fastattn::sim::lane() ^ (bits & 31), "__shfl_xor_sync");
  return value;
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const int from = fastattn::sim::lane() - static_cast<int>(by);
  fastattn::sim::shuffle(mask, &value, sizeof value, from < 0 ? fastattn::sim::lane() : from, "__shfl_up_sync");
  return value;
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const int from = fastattn::sim::lane() + static_cast<int>(by);
  fastattn::sim::shuffle(mask, &value, sizeof value, from > 31 ? fastattn::sim::lane() : from, "__shfl_down_sync");
  return value;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return fastattn::sim::ballot(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

template <class To, class From>
To fastattn_same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return fastattn_same_bits<unsigned>(x); }
inline int __float_as_int(float x) { return fastattn_same_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return fastattn_same_bits<float>(x); }
inline float __int_as_float(int x) { return fastattn_same_bits<float>(x); }

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
using std::fma;

template <class T>
T __ldg(const T* global) {
  return *global;
}

// Blocks of the simulator take turns, so the operation itself is whole; what is told is that it is no ordinary access.
template <class T, class Change>
T fastattn_atomic(T* where, Change change) {
  fastattn::sim::atomic_access(where, sizeof(T));
  T before;
  fastattn::sim::move_unseen(&before, where, sizeof before);
  const T after = change(before);
  fastattn::sim::move_unseen(where, &after, sizeof after);
  return before;
}
template <class T>
T atomicAdd(T* where, T value) {
  return fastattn_atomic(where, [&](T before) { return static_cast<T>(before + value); });
}
template <class T>
T atomicMax(T* where, T value) {
  return fastattn_atomic(where, [&](T before) { return before < value ? value : before; });
}
template <class T>
T atomicMin(T* where, T value) {
  return fastattn_atomic(where, [&](T before) { return value < before ? value : before; });
}
template <class T>
T atomicOr(T* where, T value) {
  return fastattn_atomic(where, [&](T before) { return static_cast<T>(before | value); });
}
template <class T>
T atomicAnd(T* where, T value) {
  return fastattn_atomic(where, [&](T before) { return static_cast<T>(before & value); });
}
template <class T>
T atomicExch(T* where, T value) {
  return fastattn_atomic(where, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* where, T expected, T value) {
  return fastattn_atomic(where, [&](T before) { return before == expected ? value : before; });
}
