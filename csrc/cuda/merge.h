// Parts of one problem over disjoint keys into one: each row's parts weighted by exp(their lse - the whole's).
#pragma once

#include "softmax.h"

namespace fastattn::cuda {

constexpr int kMergeThreads = 256;
constexpr int kMergeRows = kMergeThreads / arch::kWarp;  // of a block: a warp each

template <class T>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ MergeArgs a) {
  const int lane = threadIdx.x % arch::kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMergeRows + threadIdx.x / arch::kWarp;
  if (row >= a.rows) return;
  const int32_t head = static_cast<int32_t>(row / a.q_len % a.num_heads);
  float most = -INFINITY;
  for (int32_t part = lane; part < a.splits; part += arch::kWarp) most = fmaxf(most, a.part_lse[part * a.rows + row]);
  for (int step = 1; step < arch::kWarp; step *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
  float sum = 0.0f;
  for (int32_t part = lane; part < a.splits; part += arch::kWarp) {
    const float lse = a.part_lse[part * a.rows + row];
    sum += lse == -INFINITY ? 0.0f : arch::exp2_approx((lse - most) * kLog2e);
  }
  for (int step = 1; step < arch::kWarp; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  const bool nothing = most == -INFINITY;
  if (lane == 0) a.lse[row] = fabsf(most) == INFINITY ? most : most + arch::log2_approx(sum) * kLn2;
  if (a.sinks && !nothing) sum += arch::exp2_approx((a.sinks[head] - most) * kLog2e);
  const float weight = nothing ? 0.0f : 1.0f / sum;
  uint16_t* const to = static_cast<uint16_t*>(a.out) + row / a.q_len / a.num_heads * a.out_stride[0] +
                       head * a.out_stride[1] + row % a.q_len * a.out_stride[2];
  for (int32_t column = lane; column < a.head_dim_v; column += arch::kWarp) {
    float all = 0.0f;
    for (int32_t part = 0; part < a.splits; ++part) {
      const float lse = a.part_lse[part * a.rows + row];
      if (lse == -INFINITY) continue;  // it saw nothing
      all = fmaf(a.parts[(part * a.rows + row) * a.part_step + column], arch::exp2_approx((lse - most) * kLog2e), all);
    }
    to[column] = static_cast<uint16_t>(arch::pack<T>(all * weight, 0.0f));
  }
}

}  // namespace fastattn::cuda
