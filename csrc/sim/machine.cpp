#include "machine.h"

#include "instructions.h"

namespace fastattn::sim {

Machine* machine = nullptr;

Options& options() {
  static Options chosen;
  return chosen;
}

Machine::Machine(dim3 grid_size, int thread_count, int bytes, const std::function<void()>& kernel,
                 const Options& chosen)
    : grid(grid_size), threads(thread_count), shared_bytes(bytes), body(kernel), options(chosen), random(chosen.seed) {
  total_blocks_ = uint64_t{grid.x} * grid.y * grid.z;
  if (options.order == Order::kRandom) {
    constexpr uint64_t kChances[] = {0, 1, 2, 16};  // never before they must, always at once, and between
    early_ = kChances[random.below(4)];
    skewed_ = random.below(2) == 0;
  }
}

Machine::~Machine() = default;

void Machine::run() {
  while (error.empty() && (next_block_ < total_blocks_ || live_blocks_ > 0)) {
    admit();
    running = pick();
    if (running == nullptr) {
      if (error.empty()) error = stuck();
      return;
    }
    main_.switch_to(running->fiber);
  }
}

}  // namespace fastattn::sim
