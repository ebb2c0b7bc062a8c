// The forward kernel for Hopper: out and lse of attention, tile by tile.
//
//   t_ij = scale * q_i . k_j (+ soft cap, bias)
//   out_i = sum_j exp(t_ij - m_i) v_j / (sum_j exp(t_ij - m_i) + exp(sink - m_i))
//   lse_i = ln sum_j exp(t_ij); -inf, and out 0, where nothing is visible
//
// Blocks stay on their SM and take tile after tile: one warpgroup loads by TMA, the others compute with wgmma.
#pragma once

#include "compute.h"
#include "load.h"

namespace fastattn::cuda {

template <class F>
__global__ void __launch_bounds__(F::THREADS, 1) forward_kernel(const __grid_constant__ ForwardArgs a) {
  Shared<F>& s = *reinterpret_cast<Shared<F>*>(arch::dynamic_shared());
  if (threadIdx.x == 0) {
    constexpr int WARPS = F::CONSUMERS * 4;
    for (int n = 0; n < 2; ++n) {
      arch::mbarrier_init(&s.job_full[n], 1);
      arch::mbarrier_init(&s.job_empty[n], WARPS);
    }
    arch::mbarrier_init(&s.query_full, 1);
    arch::mbarrier_init(&s.query_empty, WARPS);
    arch::mbarrier_init(&s.value_landed, 1);
    for (int n = 0; n < F::STAGES; ++n) {
      arch::mbarrier_init(&s.key_full[n], 1);
      arch::mbarrier_init(&s.value_full[n], 1);
      arch::mbarrier_init(&s.key_empty[n], WARPS);
      arch::mbarrier_init(&s.value_empty[n], WARPS);
    }
    arch::mbarrier_init_fence();
  }
  if (a.tile_heads * a.tile_rows < F::BLOCK_M) {  // rows that no box of queries covers
    constexpr int COUNT = sizeof s.query / sizeof(uint4);
    uint4* const rows = reinterpret_cast<uint4*>(s.query);
    for (int n = threadIdx.x; n < COUNT; n += F::THREADS) rows[n] = make_uint4(0, 0, 0, 0);
    arch::fence_proxy_async();
  }
  __syncthreads();
  if (threadIdx.x < arch::kWarpgroup) {
    arch::registers_shrink_to<F::REGISTERS_LOADING>();
    if (threadIdx.x < arch::kWarp) Loader<F>(a, s).run();
  } else {
    arch::registers_grow_to<F::REGISTERS>();
    Computer<F>(a, s).run();
  }
}

}  // namespace fastattn::cuda
