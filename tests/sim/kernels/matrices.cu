// Each function of arch/matrix.h, one warp.
#include "harness.h"

namespace {

template <int WHICH>
__global__ void move(const uint32_t* in, uint32_t* out) {
  auto* rows = reinterpret_cast<uint16_t*>(dynamic_shared());
  const int lane = threadIdx.x;
  uint32_t fragment[4];
  if (WHICH < 2) {  // four 8x8 matrices one after the other -> fragments
    for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(rows)[lane * 4 + i] = in[lane * 4 + i];
    __syncwarp();
    if (WHICH == 0) load_matrix_x4(fragment, rows + lane * 8);
    if (WHICH == 1) load_matrix_x4_transposed(fragment, rows + lane * 8);
    for (int i = 0; i < 4; ++i) out[lane * 4 + i] = fragment[i];
  } else {
    for (int i = 0; i < 4; ++i) fragment[i] = in[lane * 4 + i];
    if (WHICH == 2) store_matrix_x4(rows + lane * 8, fragment);
    if (WHICH == 3) store_matrix_x4_transposed(rows + lane * 8, fragment);
    __syncwarp();
    for (int i = 0; i < 4; ++i) out[lane * 4 + i] = reinterpret_cast<uint32_t*>(rows)[lane * 4 + i];
  }
}

// A lane's a[4], b[2], d[4] -> its d[4].
template <class T>
__global__ void multiply(const uint32_t* in, uint32_t* out) {
  const uint32_t* own = in + threadIdx.x * 10;
  const uint32_t a[4] = {own[0], own[1], own[2], own[3]}, b[2] = {own[4], own[5]};
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(own[6 + i]);
  mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = __float_as_uint(d[i]);
}

}  // namespace

EXPORT run_matrices(int which, const void* in, void* out) {
  constexpr void (*kKernels[])(const uint32_t*, uint32_t*) = {move<0>, move<1>,        move<2>,
                                                              move<3>, multiply<bf16>, multiply<f16>};
  return run(kKernels[which], 1, kWarp, 512, static_cast<const uint32_t*>(in), static_cast<uint32_t*>(out));
}
