// A warp's matrices: ldmatrix, stmatrix, mma.sync.
#include <cstring>

#include "fragments.h"
#include "instructions.h"
#include "machine.h"
#include "numbers.h"

namespace fastattn::sim {

namespace {

constexpr int kSide = 8;
constexpr uint32_t kRowBytes = 16;

struct Move {
  uint32_t* fragment;
  uint32_t row;
  bool transposed;
};

struct Product {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
  bool bf16;
};

template <class Call>
const Call& call_of(const Team& team, int lane) {
  return *static_cast<const Call*>(team.arguments[static_cast<size_t>(lane)]);
}

// The row that a lane addresses; the lane is to blame for its address.
char* row_of(Block& block, const Team& team, int lane, uint8_t access) {
  Thread& thread = block.threads[static_cast<size_t>(team.first + lane)];
  Thread* performer = machine->running;
  machine->running = &thread;  // the same instruction, another lane: its bounds, its accesses
  const uint32_t address = call_of<Move>(team, lane).row;
  char* row = shared_bytes_at(block, address, kRowBytes, kRowBytes);
  own_access(address, kRowBytes, access);
  machine->running = performer;
  return row;
}

uint16_t half_of(uint32_t both, int element) { return static_cast<uint16_t>(both >> (16 * element)); }

void load_all(Block& block, Team& team) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t values[kSide][kSide];
    for (int row = 0; row < kSide; ++row) {
      std::memcpy(values[row], row_of(block, team, matrix * kSide + row, kRead), kRowBytes);
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const Move& call = call_of<Move>(team, lane);
      const int row = lane / 4, column = lane % 4 * 2;
      call.fragment[matrix] = call.transposed
                                  ? values[column][row] | static_cast<uint32_t>(values[column + 1][row]) << 16
                                  : values[row][column] | static_cast<uint32_t>(values[row][column + 1]) << 16;
    }
  }
}

void store_all(Block& block, Team& team) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t values[kSide][kSide];
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const Move& call = call_of<Move>(team, lane);
      const int row = lane / 4, column = lane % 4 * 2;
      for (int element = 0; element < 2; ++element) {
        uint16_t& value = call.transposed ? values[column + element][row] : values[row][column + element];
        value = half_of(call.fragment[matrix], element);
      }
    }
    for (int row = 0; row < kSide; ++row) {
      std::memcpy(row_of(block, team, matrix * kSide + row, kWrite), values[row], kRowBytes);
    }
  }
}

void multiply(Block&, Team& team) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Product& call = call_of<Product>(team, lane);
    for (int i = 0; i < 8; ++i) {
      const Place at = a_fragment(lane, i);
      a[at.row][at.column] = from_half(half_of(call.a[i / 2], i % 2), call.bf16);
    }
    for (int i = 0; i < 4; ++i) {
      const Place at = b_fragment(lane, i);
      b[at.row][at.column] = from_half(half_of(call.b[i / 2], i % 2), call.bf16);
    }
    for (int i = 0; i < 4; ++i) d[accumulator(lane, i).row][accumulator(lane, i).column] = call.d[i];
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Product& call = call_of<Product>(team, lane);
    for (int i = 0; i < 4; ++i) call.d[i] = d[accumulator(lane, i).row][accumulator(lane, i).column];
  }
}

}  // namespace

void load_matrix(uint32_t* fragment, uint32_t row, bool transposed) {
  Move own{fragment, row, transposed};
  together(own_warp(), transposed ? "ldmatrix.trans" : "ldmatrix", &own, load_all);
}

void store_matrix(uint32_t row, const uint32_t* fragment, bool transposed) {
  Move own{const_cast<uint32_t*>(fragment), row, transposed};
  together(own_warp(), transposed ? "stmatrix.trans" : "stmatrix", &own, store_all);
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, bool bf16) {
  Product own{d, a, b, bf16};
  together(own_warp(), "mma.sync", &own, multiply);
}

}  // namespace fastattn::sim
