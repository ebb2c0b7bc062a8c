// What is said when a launch goes wrong.
#include <cstdlib>

#include "machine.h"

namespace fastattn::sim {

namespace {

constexpr int kMostPlaces = 24;  // that a report of a deadlock names in a block

std::string name_of(uint3 block) {
  return "block " + std::to_string(block.x) + "," + std::to_string(block.y) + "," + std::to_string(block.z);
}

// Where a thread stands, and what it waits for.
std::string place(const Thread& thread) {
  if (thread.finished) return {};
  std::string text = std::string("in ") + thread.instruction;
  if (thread.operand_name == nullptr) return text;
  text += std::string(" ") + thread.operand_name + " " + std::to_string(thread.operand);
  const auto found = thread.block->mbarriers.find(thread.operand);
  if (found == thread.block->mbarriers.end()) return text;
  const Mbarrier& barrier = found->second;
  return text + " (phase " + std::to_string(barrier.phase) + ", " + std::to_string(barrier.pending) + " of " +
         std::to_string(barrier.count) + " arrivals and " + std::to_string(barrier.bytes) + " bytes to come)";
}

}  // namespace

std::string name_of(const Thread& thread) {
  return name_of(thread.block->index) + " warp " + std::to_string(thread.warp()) + " lane " +
         std::to_string(thread.lane()) + " (thread " + std::to_string(thread.number) + ")";
}

void Machine::blame(const Thread& thread, const char* instruction, const std::string& why) {
  if (error.empty()) error = why + " [" + name_of(thread) + ", at " + instruction + "]";
}

void Machine::stop() {
  running->fiber.switch_to(main_, true);
  std::abort();
}

void Machine::fail(const Thread& thread, const std::string& why) {
  blame(thread, thread.instruction, why);
  stop();
}

std::string Machine::stuck() const {
  std::string said = livelocked() ? "livelock: nothing changes while threads poll" : "deadlock";
  for (const auto& block : blocks_) {
    if (block->live == 0) continue;
    said += "; " + name_of(block->index) + ":";
    int places = 0;
    for (int first = 0, stop = 0; first < threads && places < kMostPlaces; first = stop) {
      const std::string where = place(block->threads[static_cast<size_t>(first)]);
      for (stop = first + 1; stop < threads && stop % kWarpSize != 0; ++stop) {
        if (place(block->threads[static_cast<size_t>(stop)]) != where) break;
      }
      if (where.empty()) continue;
      if (places++ != 0) said += ",";
      said += " warp " + std::to_string(first / kWarpSize) + " lanes " + std::to_string(first % kWarpSize) + "-" +
              std::to_string((stop - 1) % kWarpSize) + " " + where;
    }
  }
  return said;
}

}  // namespace fastattn::sim
