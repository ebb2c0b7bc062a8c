// A launch as it runs: which threads are ready, which one runs, copies in flight, and what the instructions need of it.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "block.h"
#include "options.h"

namespace fastattn::sim {

class Machine {
 public:
  Machine(dim3 grid, int threads, int shared_bytes, const std::function<void()>& body, const Options& options);
  ~Machine();

  void run();

  const dim3 grid;
  const int threads;
  const int shared_bytes;
  const std::function<void()>& body;
  const Options options;
  Random random;
  std::string error;
  Thread* running = nullptr;
  std::vector<std::shared_ptr<Copy>> in_flight;

  // Gives the processor away; comes back when somebody has made the running thread ready again.
  void wait(const char* instruction);
  void make_ready(Thread* thread);
  void progress() { idle_ = 0; }
  bool livelocked() const;

  void issue(const std::shared_ptr<Copy>& copy);
  void advance(const std::shared_ptr<Copy>& copy);  // its next step
  bool lands_early() { return early_ != 0 && random.below(early_) == 0; }

  void let_others_run();

  // The first error is kept. A thread fails, and the launch stops; a copy's step, which no thread runs, blames.
  [[noreturn]] void fail(const Thread& thread, const std::string& why);
  void blame(const Thread& thread, const char* instruction, const std::string& why);

 private:
  // scheduler.cpp
  Thread* pick();
  size_t draw();
  void land_some();
  // blocks.cpp
  void admit();
  void start_block(Block& block, uint64_t number);
  void start_thread(Thread& thread, Block& block, int number);
  void finish_thread();
  void finish_block(const Thread& last);
  static void entry();
  // report.cpp
  [[noreturn]] void stop();
  std::string stuck() const;

  Fiber main_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Block*> free_;
  std::vector<Thread*> ready_;
  size_t head_ = 0;
  uint64_t next_block_ = 0, total_blocks_ = 0;
  int live_blocks_ = 0;
  uint64_t early_ = 0;   // a copy lands with chance 1 in this many at each turn; 0: as late as it may
  bool skewed_ = false;  // some warps run ahead of others for a while
  uint64_t picks_ = 0;
  uint64_t idle_ = 0;  // turns in which nothing changed
};

extern Machine* machine;

inline Thread& self() { return *machine->running; }

// The running thread, which executes `instruction` now.
inline Thread& enter(const char* instruction) {
  Thread& thread = self();
  thread.instruction = instruction;
  thread.operand_name = nullptr;
  return thread;
}

[[noreturn]] inline void fail(const std::string& why) { machine->fail(self(), why); }

// All threads of the team call with the same instruction; the last one performs. Arguments in the threads' order.
using Perform = void (*)(Block& block, Team& team);
void together(Team& team, const char* instruction, void* argument, Perform perform);

inline Team& own_warp() { return self().block->warps[self().warp()]; }
Team& own_warpgroup(const char* instruction);
Warpgroup& warpgroup_of(Block& block, const Team& team);

// memory.cpp: `bytes` bytes of the running thread's block at a shared address, inside and aligned.
char* shared_bytes_at(Block& block, uint32_t address, size_t bytes, size_t alignment);
uint32_t shared_offset(uint32_t address);
constexpr uint32_t kSharedWindow = 1024;  // where a block's dynamic shared memory starts, as on sm_90

std::string name_of(const Thread& thread);

// mbarriers.cpp: the one at an address, or a refusal; what is wrong if bytes were expected and nobody waited for them.
Mbarrier& known_mbarrier(Block& block, uint32_t address);
std::string unobserved(const Block& block);
// The same: bytes have landed, for a copy of this stamp; a thread's copies have, all of them.
void land_bytes(Block& block, uint32_t address, uint32_t bytes, Stamp stamp);
void copies_arrive(const Copy& arrival, uint32_t address, const std::vector<Stamp>& stamps);

}  // namespace fastattn::sim
