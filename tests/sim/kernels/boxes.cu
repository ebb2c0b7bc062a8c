// TMA with tensor maps (arch/tma.h): a box of a tensor of two to five dimensions, each swizzle, in and out of bounds.
#include "harness.h"

namespace {

constexpr int kThreads = 32, kMostBytes = 8192, kMostOffset = 1024;

struct alignas(1024) Shared {
  char box[kMostOffset + kMostBytes];
  Mbarrier landed;
};

struct Where {
  int at[5];
};

enum Action : int { kLoad = 0, kHinted = 1, kStore = 2, kAdd = 3 };

// A load leaves the box as it lies in shared memory, `offset` bytes from a multiple of 1024, in `bytes`; a store or an
// addition takes it from there.
template <int RANK>
__global__ void boxes(const __grid_constant__ TensorMap map, Where where, int action, int offset, char* bytes,
                      int count) {
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  char* const box = shared.box + offset;
  const int* at = where.at;
  if (threadIdx.x == 0) {
    mbarrier_init(&shared.landed, 1);
    mbarrier_init_fence();
    prefetch_map(&map);
  }
  __syncthreads();
  if (action == kLoad || action == kHinted) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(&shared.landed, count);
      if constexpr (RANK == 2) tma_load(box, &map, &shared.landed, at[0], at[1]);
      if constexpr (RANK == 3) tma_load(box, &map, &shared.landed, at[0], at[1], at[2]);
      if constexpr (RANK == 4) {
        if (action == kLoad) tma_load(box, &map, &shared.landed, at[0], at[1], at[2], at[3]);
        if (action == kHinted) {
          const uint64_t policy = at[1] == 1 ? policy_evict_last() : policy_evict_first();
          tma_load_hinted(box, &map, &shared.landed, policy, at[0], at[1], at[2], at[3]);
        }
      }
      if constexpr (RANK == 5) tma_load(box, &map, &shared.landed, at[0], at[1], at[2], at[3], at[4]);
    }
    mbarrier_wait(&shared.landed, 0);
    for (int i = threadIdx.x; i < count; i += kThreads) bytes[i] = box[i];
    return;
  }
  for (int i = threadIdx.x; i < count; i += kThreads) box[i] = bytes[i];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    if constexpr (RANK == 4) {
      if (action == kStore) tma_store(&map, box, at[0], at[1], at[2], at[3]);
      if (action == kAdd) tma_add(&map, box, at[0], at[1], at[2], at[3]);
    }
    if constexpr (RANK == 5) tma_store(&map, box, at[0], at[1], at[2], at[3], at[4]);
    bulk_commit();
    bulk_wait_read<0>();
  }
}

}  // namespace

// `shape`: element, swizzle, then extents, box sides and coordinates, `rank` of each; the tensor is contiguous and
// begins `first` bytes into `tensor`.
EXPORT run_boxes(int rank, int action, const int* shape, int offset, int first, void* tensor, void* bytes) {
  constexpr int kSizes[] = {2, 2, 4};
  TensorShape described;
  described.element = static_cast<Element>(shape[0]);
  described.swizzle = static_cast<Swizzle>(shape[1]);
  described.rank = rank;
  Where where = {};
  int count = kSizes[shape[0]];
  uint64_t stride = static_cast<uint64_t>(count);
  for (int each = 0; each < rank; ++each) {
    described.extent[each] = static_cast<uint64_t>(shape[2 + each]);
    described.box[each] = static_cast<uint32_t>(shape[2 + rank + each]);
    described.stride[each] = stride;
    where.at[each] = shape[2 + 2 * rank + each];
    stride *= described.extent[each];
    count *= static_cast<int>(described.box[each]);
  }
  TensorMap map;
  if (const char* said = encode_tensor_map(&map, static_cast<char*>(tensor) + first, described)) return said;
  constexpr void (*kKernels[])(TensorMap, Where, int, int, char*, int) = {boxes<2>, boxes<3>, boxes<4>, boxes<5>};
  return run(kKernels[rank - 2], 1, kThreads, static_cast<int>(sizeof(Shared)), map, where, action, offset,
             static_cast<char*>(bytes), count);
}
