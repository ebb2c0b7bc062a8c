// What a launch is made of: threads in warps and warpgroups, their barriers, their copies, in blocks.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "clocks.h"
#include "cuda_types.h"
#include "fiber.h"
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

// Stores of a warp to global memory since it last executed an instruction together: how often each lane has come to a
// place in the kernel, and which sectors the warp's store there has touched each time.
struct Stores {
  std::map<std::pair<const void*, int>, int> times;           // of (place, lane)
  std::set<std::tuple<const void*, int, uintptr_t>> sectors;  // (place, time, sector)
};

// Threads that execute an instruction together. The last one to arrive performs it for all.
struct Team {
  const char* name = "";
  int first = 0, size = 0;  // numbers of its threads
  int arrived = 0, exited = 0;
  const char* instruction = nullptr;
  std::vector<void*> arguments;
  Stores stores;
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
  int registers_left = 0;  // of the pool that setmaxnreg shares, a thread of a warpgroup
  std::vector<Thread*> register_waiters;
  int elected_lane = 0;
};

}  // namespace fastattn::sim
