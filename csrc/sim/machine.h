// The state of a launch: threads in warps and warpgroups, blocks that run, copies in flight, and who runs next.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "clocks.h"
#include "cuda_types.h"
#include "fiber.h"
#include "options.h"
#include "shadow.h"

namespace fastattn::sim {

struct Block;
struct Warpgroup;

constexpr int kWarpSize = 32;
constexpr int kWarpgroupSize = 128;
constexpr uint32_t kEngines = 64;  // actors beside a block's threads: asynchronous operations take them in turn

// An asynchronous copy: its steps happen one after the other, each at any time after it was issued. A load has one; a
// store reads shared memory first and writes global memory then.
struct Copy {
  const char* instruction = nullptr;
  Block* block = nullptr;
  int issuer = 0;  // the thread's number in its block
  Stamp stamp;
  std::vector<std::function<void()>> steps;
  size_t next = 0;
  bool waited = false;  // by who issued it; of a store, until it has read shared memory

  bool done() const { return next == steps.size(); }
};
using CopyGroup = std::vector<std::shared_ptr<Copy>>;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  uint3 index{};
  int number = 0;  // in its block
  bool finished = false;
  const char* instruction = "the kernel";  // the last one of the simulator's, or where it waits
  const char* operand_name = nullptr;
  uint32_t operand = 0;
  CopyGroup open_copies, open_bulk;  // issued, not committed
  std::vector<CopyGroup> copies, bulk;
  Knowledge knows;

  int lane() const { return number % kWarpSize; }
  int warp() const { return number / kWarpSize; }
};

// Threads that execute an instruction together. The last one to arrive performs it for all.
struct Team {
  const char* name = "";
  int first = 0, size = 0;  // numbers of its threads
  int arrived = 0, exited = 0;
  const char* instruction = nullptr;
  std::vector<void*> arguments;
};

struct NamedBarrier {
  int arrived = 0, threads = 0;
  std::vector<Thread*> waiters;
  Knowledge gathered;
};

struct Mbarrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;  // expected and not landed
  uint32_t phase = 0;
  bool announced = false;  // to the copy engines, by a fence
  Stamp made;              // its initialisation, which must come before every use
  uint32_t loaded = 0;     // the phases that have to end for all expected bytes to have landed
  uint32_t observed = 0;   // the phases that somebody has waited for
  std::vector<Thread*> waiters;
  Knowledge gathered, published;  // by this phase's arrivals; by those of the phases that have ended
};

// Its guards on both sides are nobody's: an access to them is one out of bounds.
constexpr ptrdiff_t kSharedGuard = 64 << 10;

class SharedMemory {
 public:
  explicit SharedMemory(int size);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  char* begin() const { return memory_ + kSharedGuard; }  // aligned to a page

 private:
  size_t bytes_;
  char* memory_ = nullptr;
};

struct Block {
  Block(int thread_count, int shared_bytes);
  ~Block();

  uint3 index{};
  std::unique_ptr<Thread[]> threads;
  int live = 0;
  SharedMemory shared;
  Shadow shadow;
  std::vector<Team> warps, warpgroup_teams;
  std::vector<std::unique_ptr<Warpgroup>> warpgroups;
  std::vector<int> priority;  // a warp's, while the order is random
  NamedBarrier barriers[16];
  std::unordered_map<uint32_t, Mbarrier> mbarriers;
  uint32_t next_engine = 0;
  int copies_in_flight = 0;
  int registers_left = 0;  // of the pool that setmaxnreg shares, a thread of a warpgroup
  std::vector<Thread*> register_waiters;
  int elected_lane = 0;
};

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

  void issue(const std::shared_ptr<Copy>& copy);
  void advance(const std::shared_ptr<Copy>& copy);  // its next step
  bool one_in(uint64_t count) { return options.order == Order::kRandom && random.below(count) == 0; }
  bool lands_early() { return early_ != 0 && random.below(early_) == 0; }

  void let_others_run();

  // The first error is kept. A copy's step, which no thread runs, blames; a thread fails, and the launch stops.
  void blame(const Thread& thread, const char* instruction, const std::string& why);
  [[noreturn]] void fail(const Thread& thread, const std::string& why);

 private:
  [[noreturn]] void stop();
  Thread* pick();
  void land_some();
  void admit();
  void start_block(Block& block, uint64_t number);
  void finish_thread();
  void unfinished(Thread& thread, const Copy& copy);
  std::string stuck() const;
  static void entry();

  Fiber main_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Block*> free_;
  std::vector<Thread*> ready_;
  size_t head_ = 0;
  uint64_t next_block_ = 0, total_blocks_ = 0;
  int live_blocks_ = 0;
  uint64_t early_ = 0;  // a copy lands with chance 1 in this many at each turn; 0: as late as it may
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

// mbarriers.cpp: bytes that have landed, for a copy of this stamp.
void land_bytes(Block& block, uint32_t address, uint32_t bytes, Stamp stamp);
std::string unobserved(const Block& block);
void copies_arrive(Block& block, uint32_t address, const std::vector<Stamp>& stamps);

}  // namespace fastattn::sim
