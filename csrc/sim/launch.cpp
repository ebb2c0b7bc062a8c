#include <mutex>

#include "instructions.h"
#include "machine.h"
#include "wgmma_state.h"

namespace fastattn::sim {

namespace {

constexpr int kMostThreads = 1024;
constexpr int kMostShared = 227 << 10;   // bytes, sm_90
constexpr unsigned kMostBlocks = 65535;  // of the grid's y and z

std::string refusal(dim3 grid, int threads, int shared_bytes) {
  const auto said = [](const char* what, int64_t got, const char* limit) {
    return std::string("launch: ") + what + " is " + std::to_string(got) + ", and " + limit;
  };
  if (threads <= 0 || threads > kMostThreads || threads % kWarpSize != 0) {
    return said("the number of threads", threads, "a block has 32 to 1024 in whole warps");
  }
  if (shared_bytes < 0 || shared_bytes > kMostShared) {
    return said("the shared memory", shared_bytes, "a block has at most 232448 bytes");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return said("a side of the grid", 0, "a grid has at least one block");
  if (grid.x > 0x7fffffffu) return said("the grid's x", grid.x, "it is at most 2147483647");
  if (grid.y > kMostBlocks) return said("the grid's y", grid.y, "it is at most 65535");
  if (grid.z > kMostBlocks) return said("the grid's z", grid.z, "it is at most 65535");
  return {};
}

}  // namespace

const char* launch(dim3 grid, int threads, int shared_bytes, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  static std::string said;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  said = refusal(grid, threads, shared_bytes);
  if (!said.empty()) return said.c_str();
  Machine run(grid, threads, shared_bytes, body, options());
  machine = &run;
  run.run();
  machine = nullptr;
  said = run.error;
  return said.empty() ? nullptr : said.c_str();
}

}  // namespace fastattn::sim

// For who loads the library: what the next launches do.
extern "C" __attribute__((visibility("default"))) void fastattn_sim_options(uint64_t seed, int fixed_order,
                                                                            int resident) {
  fastattn::sim::Options& chosen = fastattn::sim::options();
  chosen.seed = seed;
  chosen.order = fixed_order != 0 ? fastattn::sim::Order::kFixed : fastattn::sim::Order::kRandom;
  chosen.resident = resident;
}
