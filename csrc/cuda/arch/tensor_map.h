// A tensor as TMA sees it: made on the host, passed to the kernel by value as a `const __grid_constant__` parameter.
#pragma once

#include <cstdio>

#include "dialect.h"
#include "driver.h"

namespace fastattn::arch {

enum class Swizzle : int { kNone = 0, k32 = 1, k64 = 2, k128 = 3 };
enum class Element : int { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

// Dimensions innermost first; strides in bytes, of dimension 1 and up (the innermost is contiguous), multiples of 16.
// A box is what one copy moves: its innermost row has at most as many bytes as the swizzle pattern, 32, 64 or 128.
// The sizes that CUDA accepts: rank 2 to 5, extents up to 2^32, box sides up to 256, base aligned to 16 bytes, swizzled
// or not (an H200 agreed in November 2026, at 16, 48 and 80 bytes beyond a multiple of 128).
struct TensorShape {
  Element element = Element::kBFloat16;
  int rank = 4;
  uint64_t extent[5] = {1, 1, 1, 1, 1};
  uint64_t stride[5] = {0, 0, 0, 0, 0};  // [0] is not read
  uint32_t box[5] = {1, 1, 1, 1, 1};
  Swizzle swizzle = Swizzle::k128;
};

#ifdef FASTATTN_SIM

using TensorMap = sim::TensorMap;

// Null, or why not, in words that last until the next call.
inline const char* encode_tensor_map(TensorMap* map, const void* base, const TensorShape& shape) {
  return sim::encode_tensor_map(map, base, static_cast<int>(shape.element), shape.rank, shape.extent, shape.stride,
                                shape.box, static_cast<int>(shape.swizzle));
}

#else

using TensorMap = CUtensorMap;

// cuTensorMapEncodeTiled, which wants a context to be current (driver.h, OnDevice).
inline const char* encode_tensor_map(TensorMap* map, const void* base, const TensorShape& shape) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static thread_local char said[160];
  static Encode encode = nullptr;
  if (encode == nullptr) {
    encode = reinterpret_cast<Encode>(driver_function("cuTensorMapEncodeTiled", said, sizeof said));
    if (encode == nullptr) return said;
  }
  constexpr CUtensorMapDataType kType[] = {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                           CU_TENSOR_MAP_DATA_TYPE_FLOAT32};
  constexpr CUtensorMapSwizzle kSwizzle[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                             CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  const cuuint32_t dense[5] = {1, 1, 1, 1, 1};
  const cuuint64_t* extent = reinterpret_cast<const cuuint64_t*>(shape.extent);
  const cuuint64_t* stride = reinterpret_cast<const cuuint64_t*>(shape.stride + 1);
  const CUresult result =
      encode(map, kType[static_cast<int>(shape.element)], static_cast<cuuint32_t>(shape.rank), const_cast<void*>(base),
             extent, stride, shape.box, dense, CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzle[static_cast<int>(shape.swizzle)],
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return nullptr;
  std::snprintf(said, sizeof said, "cuTensorMapEncodeTiled refuses with error %d", static_cast<int>(result));
  return said;
}

#endif

}  // namespace fastattn::arch
