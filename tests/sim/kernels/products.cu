// Every wgmma of arch/wgmma/: D[64, N] = 1 + A[64, 64] B[64, N], one warpgroup; operands are laid out by ordinary
// stores.
#include "harness.h"

namespace {

constexpr int kM = 64, kK = 64, kTile = 64 * 128;  // bytes of 64 rows of 128

struct alignas(1024) Shared {
  char a[kTile];
  char b[4 * kTile];
};

// Element (row, column) of tiles of 64 columns, rows of 128 bytes, swizzled.
template <class T>
DEVICE T* element(char* tiles, int row, int column, int rows) {
  const int at = column / 64 * rows * 128 + row * 128 + column % 64 * 2;
  return reinterpret_cast<T*>(tiles + (at ^ (at >> 7 & 7) << 4));
}

// `a` is [64, 64], `b` is [64, N], both row by row.
template <int N, class T, bool A_REGISTERS, Major A, Major B>
__global__ void __launch_bounds__(kWarpgroup) multiply(const T* a, const T* b, float* d) {
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int thread = threadIdx.x;
  for (int i = thread; i < kM * kK; i += kWarpgroup) {
    const int m = i / kK, k = i % kK;
    *(A == Major::kMN ? element<T>(shared.a, k, m, kK) : element<T>(shared.a, m, k, kM)) = a[i];
  }
  for (int i = thread; i < kK * N; i += kWarpgroup) {
    const int k = i / N, n = i % N;
    *(B == Major::kMN ? element<T>(shared.b, k, n, kK) : element<T>(shared.b, n, k, N)) = b[i];
  }
  fence_proxy_async();
  __syncthreads();
  const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  float sums[N / 2];
  uint32_t fragments[kK / 16][4];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) sums[i] = 1.0f;
#pragma unroll
  for (int step = 0; step < kK / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* own = a + (row + i % 2 * 8) * kK + step * 16 + column + i / 2 * 8;
      fragments[step][i] = own[0].bits | static_cast<uint32_t>(own[1].bits) << 16;
    }
  }
  const uint64_t a_at = descriptor_128(shared.a), b_at = descriptor_128(shared.b, 1024, kTile);
  settle_registers(sums);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kK / 16; ++step) {
    // Sixteen ks further: 32 bytes along a K-major row, sixteen rows of an MN-major tile.
    const uint64_t a_step = a_at + (A == Major::kMN ? step * 128 : step * 2);
    const uint64_t b_step = b_at + (B == Major::kMN ? step * 128 : step * 2);
    if constexpr (A_REGISTERS) {
      wgmma_rs<N, T, B>(sums, fragments[step], b_step, true);
    } else {
      wgmma_ss<N, T, A, B>(sums, a_step, b_step, true);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  settle_registers(sums);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + column + i % 2] = sums[i];
}

template <int N, class T>
const char* multiply_as(int form, const void* a, const void* b, void* d) {
  constexpr Major kK_ = Major::kK, kMN = Major::kMN;
  void (*kernel)(const T*, const T*, float*) = nullptr;
  if (form == 0) kernel = multiply<N, T, false, kK_, kK_>;
  if (form == 1) kernel = multiply<N, T, true, kK_, kMN>;
  if constexpr (N == 64) {
    if (form == 2) kernel = multiply<N, T, false, kK_, kMN>;
    if (form == 3) kernel = multiply<N, T, false, kMN, kK_>;
    if (form == 4) kernel = multiply<N, T, false, kMN, kMN>;
    if (form == 5) kernel = multiply<N, T, true, kK_, kK_>;
  }
  return run(kernel, 1, kWarpgroup, static_cast<int>(sizeof(Shared)), static_cast<const T*>(a),
             static_cast<const T*>(b), static_cast<float*>(d));
}

template <int N>
const char* multiply_of(int is_bf16, int form, const void* a, const void* b, void* d) {
  return is_bf16 != 0 ? multiply_as<N, bf16>(form, a, b, d) : multiply_as<N, f16>(form, a, b, d);
}

}  // namespace

// `form`: 0 A and B in shared memory, K-major; 1 A in registers, B MN-major; of N = 64 also 2 to 4, the other majors of
// both in shared memory, and 5, A in registers, B K-major.
EXPORT run_products(int n, int is_bf16, int form, const void* a, const void* b, void* d) {
  switch (n) {
    case 64: return multiply_of<64>(is_bf16, form, a, b, d);
    case 80: return multiply_of<80>(is_bf16, form, a, b, d);
    case 96: return multiply_of<96>(is_bf16, form, a, b, d);
    case 112: return multiply_of<112>(is_bf16, form, a, b, d);
    case 128: return multiply_of<128>(is_bf16, form, a, b, d);
    case 144: return multiply_of<144>(is_bf16, form, a, b, d);
    case 160: return multiply_of<160>(is_bf16, form, a, b, d);
    case 176: return multiply_of<176>(is_bf16, form, a, b, d);
    case 192: return multiply_of<192>(is_bf16, form, a, b, d);
    case 256: return multiply_of<256>(is_bf16, form, a, b, d);
    default: return "no wgmma of this N";
  }
}
