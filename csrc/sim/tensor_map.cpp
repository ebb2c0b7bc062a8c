// TMA: boxes of a tensor between global and swizzled shared memory.
#include <cstring>

#include "copies.h"
#include "instructions.h"
#include "machine.h"
#include "numbers.h"
#include "swizzle.h"

namespace fastattn::sim {

namespace {

constexpr int kSizes[] = {2, 2, 4};  // bytes of a bf16, a f16, a float32
constexpr uint32_t kPiece = 16;      // bytes that the swizzle moves together
constexpr uint32_t kSharedAlignment = 128;
constexpr uint32_t kMostSide = 256;
constexpr uint64_t kMostStride = uint64_t{1} << 40;

struct Box {
  TensorMap map;
  int64_t at[5] = {0, 0, 0, 0, 0};

  uint32_t row_bytes() const { return map.box[0] * static_cast<uint32_t>(kSizes[map.element]); }
  uint32_t rows() const {
    uint32_t count = 1;
    for (int dimension = 1; dimension < map.rank; ++dimension) count *= map.box[dimension];
    return count;
  }

  // Where the first element of a row of the box lies, and whether any of the row does.
  bool row(uint32_t number, char** where) const {
    char* address = map.base;
    for (int dimension = 1; dimension < map.rank; ++dimension) {
      const int64_t index = at[dimension] + number % map.box[dimension];
      number /= map.box[dimension];
      if (index < 0 || index >= static_cast<int64_t>(map.extent[dimension])) return false;
      address += index * static_cast<int64_t>(map.stride[dimension]);
    }
    *where = address;
    return true;
  }

  bool inside(int64_t column) const { return column >= 0 && column < static_cast<int64_t>(map.extent[0]); }
};

Box box_of(const TensorMap* map, uint32_t shared, std::initializer_list<int> at) {
  Box box{*map, {}};
  if (static_cast<int>(at.size()) != map->rank) {
    fail(std::to_string(at.size()) + " coordinates for a tensor of " + std::to_string(map->rank) + " dimensions");
  }
  std::copy(at.begin(), at.end(), box.at);
  shared_bytes_at(*self().block, shared, size_t{box.row_bytes()} * box.rows(), kSharedAlignment);
  return box;
}

void load(const Box& box, char* memory, uint32_t shared) {
  const int size = kSizes[box.map.element];
  for (uint32_t row = 0; row < box.rows(); ++row) {
    char* from = nullptr;
    const bool there = box.row(row, &from);
    for (uint32_t byte = 0; byte < box.row_bytes(); byte += kPiece) {
      const uint32_t to = swizzled(shared + row * box.row_bytes() + byte, box.map.swizzle);
      for (uint32_t part = 0; part < kPiece; part += static_cast<uint32_t>(size)) {
        const int64_t column = box.at[0] + (byte + part) / static_cast<uint32_t>(size);
        char* place = memory + shared_offset(to) + part;
        if (there && box.inside(column)) {
          std::memcpy(place, from + column * size, static_cast<size_t>(size));
        } else {
          std::memset(place, 0, static_cast<size_t>(size));
        }
      }
    }
  }
}

void put(const Box& box, char* to, const char* element, bool add) {
  if (!add) {
    std::memcpy(to, element, static_cast<size_t>(kSizes[box.map.element]));
  } else if (box.map.element == 2) {
    float sum, term;
    std::memcpy(&sum, to, sizeof sum);
    std::memcpy(&term, element, sizeof term);
    sum += term;
    std::memcpy(to, &sum, sizeof sum);
  } else {
    const bool bf16 = box.map.element == 0;
    uint16_t sum, term;
    std::memcpy(&sum, to, sizeof sum);
    std::memcpy(&term, element, sizeof term);
    sum = to_half(from_half(sum, bf16) + from_half(term, bf16), bf16);
    std::memcpy(to, &sum, sizeof sum);
  }
}

// `elements` is the box as it lay in shared memory, unswizzled.
void store(const Box& box, const char* elements, bool add) {
  const int size = kSizes[box.map.element];
  for (uint32_t row = 0; row < box.rows(); ++row) {
    char* to = nullptr;
    if (!box.row(row, &to)) continue;
    for (uint32_t column = 0; column < box.map.box[0]; ++column) {
      const int64_t at = box.at[0] + column;
      const char* element = elements + row * box.row_bytes() + column * static_cast<uint32_t>(size);
      if (box.inside(at)) put(box, to + at * size, element, add);
    }
  }
}

}  // namespace

const char* encode_tensor_map(TensorMap* map, const void* base, int element, int rank, const uint64_t* extent,
                              const uint64_t* stride, const uint32_t* box, int swizzle) {
  static thread_local std::string said;
  const auto refuse = [](const std::string& why) {
    said = "tensor map: " + why;
    return said.c_str();
  };
  const auto number = [](const char* what, int dimension, uint64_t got) {
    return std::string(what) + " " + std::to_string(dimension) + " is " + std::to_string(got);
  };
  if (rank < 2 || rank > 5) return refuse("a rank of " + std::to_string(rank) + ": it is 2 to 5 here");
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0) return refuse("the base address is no multiple of 16");
  *map = TensorMap{};
  map->base = static_cast<char*>(const_cast<void*>(base));
  map->element = element;
  map->rank = rank;
  map->swizzle = swizzle;
  for (int dimension = 0; dimension < rank; ++dimension) {
    if (extent[dimension] == 0 || extent[dimension] > uint64_t{1} << 32) {
      return refuse(number("extent", dimension, extent[dimension]) + ": it is 1 to 2^32");
    }
    if (box[dimension] == 0 || box[dimension] > kMostSide) {
      return refuse(number("side", dimension, box[dimension]) + " of the box: it is 1 to 256");
    }
    if (dimension > 0 && (stride[dimension] % 16 != 0 || stride[dimension] >= kMostStride)) {
      return refuse(number("stride", dimension, stride[dimension]) + " bytes: it is a multiple of 16 below 2^40");
    }
    map->extent[dimension] = extent[dimension];
    map->box[dimension] = box[dimension];
    map->stride[dimension] = dimension > 0 ? stride[dimension] : 0;
  }
  const uint32_t row_bytes = box[0] * static_cast<uint32_t>(kSizes[element]);
  if (row_bytes % 16 != 0) {
    return refuse("a row of the box has " + std::to_string(row_bytes) + " bytes: it is a multiple of 16");
  }
  if (swizzle != 0 && row_bytes != swizzle_span(swizzle)) {
    return refuse("a row of the box has " + std::to_string(row_bytes) + " bytes, and the swizzle's pattern is " +
                  std::to_string(swizzle_span(swizzle)) + " wide: they are equal here");
  }
  return nullptr;
}

void tma_load(uint32_t shared, const TensorMap* map, uint32_t barrier, std::initializer_list<int> at) {
  Thread& thread = enter("cp.async.bulk.tensor (load)");
  Block& block = *thread.block;
  const Box box = box_of(map, shared, at);
  announced(barrier);
  const uint32_t bytes = box.row_bytes() * box.rows();
  auto copy = new_copy(thread.instruction);
  engine_access(thread, shared, bytes, kWrite | kAsync, copy->stamp, thread.knows);
  copy->steps.push_back([box, shared, bytes, barrier, &block, stamp = copy->stamp] {
    load(box, block.shared.begin(), shared);
    land_bytes(block, barrier, bytes, stamp);
  });
  machine->issue(copy);
}

void tma_store(const TensorMap* map, uint32_t shared, std::initializer_list<int> at, bool add) {
  Thread& thread = enter(add ? "cp.reduce.async.bulk.tensor" : "cp.async.bulk.tensor (store)");
  Block& block = *thread.block;
  const Box box = box_of(map, shared, at);
  for (int dimension = 0; dimension < map->rank; ++dimension) {
    if (box.at[dimension] < 0) {
      fail("an illegal instruction was encountered: coordinate " + std::to_string(dimension) + " is " +
           std::to_string(box.at[dimension]) + ", and a box that goes out starts at 0 or beyond");
    }
  }
  auto copy = new_copy(thread.instruction);
  engine_access(thread, shared, box.row_bytes() * box.rows(), kRead | kAsync, copy->stamp, thread.knows);
  auto taken = std::make_shared<std::vector<char>>(size_t{box.row_bytes()} * box.rows());
  copy->steps.push_back([box, taken, shared, &block] {
    for (uint32_t byte = 0; byte < taken->size(); byte += kPiece) {
      const uint32_t from = swizzled(shared + byte, box.map.swizzle);
      std::memcpy(taken->data() + byte, block.shared.begin() + shared_offset(from), kPiece);
    }
  });
  copy->steps.push_back([box, taken, add] { store(box, taken->data(), add); });
  thread.open_bulk.push_back(copy);
  machine->issue(copy);
}

}  // namespace fastattn::sim
