// How a launch is simulated.
#pragma once

#include <cstdint>

namespace fastattn::sim {

enum class Order : int {
  kRandom = 0,  // threads and asynchronous copies in an order drawn from the seed
  kFixed = 1,   // threads in turn, copies as late as they may
};

struct Options {
  uint64_t seed = 0;
  Order order = Order::kRandom;
  int resident = 2;  // blocks that run at the same time
  bool checks =
      false;  // every access to shared memory is held against the barriers: the kernel must be compiled for it
};

Options& options();

// splitmix64 (Steele, Lea, Flood 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  uint64_t below(uint64_t limit) { return next() % limit; }

 private:
  uint64_t state_;
};

}  // namespace fastattn::sim
