// cp.async (arch/copy.h), the runs of bytes of arch/tma.h, the stores of arch/global.h: 64 threads, 1024 bytes.
#include "harness.h"

namespace {

constexpr int kThreads = 64, kBytes = kThreads * 16;

struct alignas(128) Shared {
  uint4 pieces[kThreads];
  Mbarrier landed;
};

// 0: cp.async, every third piece zeros. 1: the same, waited for through an mbarrier. 2: a bulk load. 3: a bulk store.
// 4: a bulk addition of floats to what `out` holds. 5, 6, 7: 16, 8, 4 bytes a lane at a time, side by side; 8: 4
// bytes of each lane's own 16.
template <int WHICH>
__global__ void copies(const uint4* in, uint4* out) {
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int thread = threadIdx.x;
  if (thread == 0) {
    mbarrier_init(&shared.landed, WHICH == 1 ? kThreads : 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (WHICH < 2) {
    copy_async(&shared.pieces[thread], in + thread, thread % 3 != 0);
    if (WHICH == 0) {
      copy_async_commit();
      copy_async_wait<0>();
      __syncthreads();
    } else {
      copy_async_arrive(&shared.landed);
      mbarrier_wait(&shared.landed, 0);
    }
    out[thread] = shared.pieces[thread ^ 1];
  } else if (WHICH == 2) {
    if (thread == 0) {
      mbarrier_arrive_expect(&shared.landed, kBytes);
      bulk_load(shared.pieces, in, kBytes, &shared.landed);
    }
    mbarrier_wait(&shared.landed, 0);
    out[thread] = shared.pieces[thread];
  } else if (WHICH == 5) {
    store_global(out + thread, in[thread]);
  } else if (WHICH > 5) {
    const float* from = reinterpret_cast<const float*>(in);
    float* to = reinterpret_cast<float*>(out);
#pragma unroll
    for (int n = 0; n < (WHICH == 6 ? 2 : 4); ++n) {
      const int pair = 2 * (n * kThreads + thread), single = WHICH == 7 ? n * kThreads + thread : 4 * thread + n;
      if (WHICH == 6) store_global(to + pair, make_float2(from[pair], from[pair + 1]));
      if (WHICH != 6) store_global(to + single, from[single]);
    }
  } else {
    shared.pieces[thread] = in[thread];
    fence_proxy_async();
    __syncthreads();
    if (thread == 0) {
      if (WHICH == 3) bulk_store(out, shared.pieces, kBytes);
      if (WHICH == 4) bulk_add(reinterpret_cast<float*>(out), reinterpret_cast<const float*>(shared.pieces), kBytes);
      bulk_commit();
      bulk_wait<0>();
    }
  }
}

}  // namespace

EXPORT run_copies(int which, const void* in, void* out) {
  constexpr void (*kKernels[])(const uint4*, uint4*) = {copies<0>, copies<1>, copies<2>, copies<3>, copies<4>,
                                                        copies<5>, copies<6>, copies<7>, copies<8>};
  return run(kKernels[which], 1, kThreads, static_cast<int>(sizeof(Shared)), static_cast<const uint4*>(in),
             static_cast<uint4*>(out));
}
