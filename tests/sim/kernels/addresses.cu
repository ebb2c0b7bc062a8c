// Accesses to global memory that AddressSanitizer must see, and what UBSan must. For the simulator alone.
#include "harness.h"

namespace {

constexpr int kThreads = 32;

struct alignas(128) Shared {
  float row[64];
  Mbarrier barrier;
};

// 0: nothing wrong. 1: a load, 2: a store past the end. 3: cp.async, 4: a bulk load, 5: a bulk store past the end. 6: a
// tensor map that is larger than the tensor. 7: a pointer past the end of shared memory. 8: a signed overflow. 9: a
// store of 16 bytes past the end.
__global__ void wrong(const __grid_constant__ TensorMap map, float* data, int count, int which) {
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int thread = threadIdx.x;
  if (thread == 0) {
    mbarrier_init(&shared.barrier, 1);
    mbarrier_init_fence();
  }
  shared.row[thread] = static_cast<float>(thread);
  fence_proxy_async();
  __syncthreads();
  if (which == 1) shared.row[thread] = data[thread + count - kThreads + 1];
  if (which == 2) data[thread + count - kThreads + 1] = 1.0f;
  if (which == 7) {
    const float* row = shared.row;
    shared.row[thread] = row[thread + sizeof(Shared) / 4];
  }
  if (which == 8) data[thread] = static_cast<float>(count * (0x7fffffff - thread));
  if (thread != 0) return;
  if (which == 9) store_global(data + count, make_uint4(0, 0, 0, 0));
  if (which == 3) {
    copy_async(shared.row, data + count, true);
    copy_async_commit();
    copy_async_wait<0>();
  }
  if (which == 4 || which == 6) {
    mbarrier_arrive_expect(&shared.barrier, 64);
    if (which == 4) bulk_load(shared.row, data + count - 8, 64, &shared.barrier);
    if (which == 6) tma_load(shared.row, &map, &shared.barrier, 0, 1);
    mbarrier_wait(&shared.barrier, 0);
  }
  if (which == 5) {
    bulk_store(data + count - 8, shared.row, 64);
    bulk_commit();
    bulk_wait<0>();
  }
}

}  // namespace

// `data` has `count` floats, and the tensor map says two rows of as many.
EXPORT run_addresses(float* data, int count, int which) {
  TensorShape shape;
  shape.element = Element::kFloat32;
  shape.rank = 2;
  shape.swizzle = Swizzle::kNone;
  shape.extent[0] = static_cast<uint64_t>(count);
  shape.extent[1] = 2;
  shape.stride[1] = static_cast<uint64_t>(count) * 4;
  shape.box[0] = 16;
  TensorMap map;
  if (const char* said = encode_tensor_map(&map, data, shape)) return said;
  return run(wrong, 1, kThreads, static_cast<int>(sizeof(Shared)), map, data, count, which);
}
