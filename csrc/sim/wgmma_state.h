// A warpgroup's tensor-core work: products that are in flight, in order, and the accumulators that they add to.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "clocks.h"
#include "machine.h"

namespace fastattn::sim {

// Sums of one chain of products, [64, n], while they are in flight; the registers hold a poison meanwhile.
struct Accumulator {
  int n = 0;
  float* registers[kWarpgroupSize] = {};
  std::vector<float> sums;
  int products = 0;
};

struct Product {
  int n = 0;
  bool bf16 = false, accumulate = false;
  bool a_in_registers = false, a_mn_major = false, b_mn_major = false;
  uint64_t a_at = 0, b_at = 0;
  uint32_t a[kWarpgroupSize][4];  // as they were when it was issued
  const uint32_t* a_registers[kWarpgroupSize] = {};
  std::shared_ptr<Accumulator> sums;
  Stamp stamp;
  bool performed = false;
};

struct Warpgroup {
  std::vector<std::shared_ptr<Product>> open;                  // not committed
  std::vector<std::vector<std::shared_ptr<Product>>> batches;  // committed, not waited for
  bool fenced = false;
  int registers = 0;        // setmaxnreg's
  bool shared_out = false;  // it has executed one

  bool idle() const { return open.empty() && batches.empty(); }
};

}  // namespace fastattn::sim
