// Blocks and their threads, from the start to the end.
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "machine.h"
#include "wgmma_state.h"

namespace fastattn::sim {

namespace {

constexpr int kPool = 65536;  // registers of a block that launches with all of them
constexpr int kMostRegisters = 256;

std::vector<Team> teams(const char* name, int threads, int size) {
  std::vector<Team> made(static_cast<size_t>(threads / size));
  for (size_t at = 0; at < made.size(); ++at) {
    made[at].name = name;
    made[at].first = static_cast<int>(at) * size;
    made[at].size = size;
    made[at].arguments.resize(static_cast<size_t>(size));
  }
  return made;
}

// What the thread has issued and nobody has waited for, wherever it may be by now.
const Copy* unfinished(const Thread& thread) {
  for (const auto* groups : {&thread.copies, &thread.bulk}) {
    for (const auto& group : *groups) {
      for (const auto& copy : group) {
        if (!copy->waited) return copy.get();
      }
    }
  }
  for (const auto* open : {&thread.open_copies, &thread.open_bulk}) {
    if (!open->empty()) return open->front().get();
  }
  return nullptr;
}

}  // namespace

Block::Block(int thread_count, int shared_bytes)
    : threads(std::make_unique<Thread[]>(static_cast<size_t>(thread_count))), shared(shared_bytes) {}

Block::~Block() = default;

void Machine::admit() {
  while (next_block_ < total_blocks_ && live_blocks_ < std::max(options.resident, 1)) {
    if (free_.empty()) {
      blocks_.push_back(std::make_unique<Block>(threads, shared_bytes));
      free_.push_back(blocks_.back().get());
    }
    Block* block = free_.back();
    free_.pop_back();
    ++live_blocks_;
    start_block(*block, next_block_++);
  }
}

void Machine::start_block(Block& block, uint64_t number) {
  const bool any_order = options.order == Order::kRandom;
  block.index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                 static_cast<unsigned>(number / (uint64_t{grid.x} * grid.y))};
  std::memset(block.shared.begin(), 0xFF, static_cast<size_t>(shared_bytes));  // NaN
  block.shadow.reset(options.checks ? shared_bytes : 0);
  block.live = threads;
  block.mbarriers.clear();
  block.next_engine = 0;
  block.elected_lane = any_order ? static_cast<int>(random.below(kWarpSize)) : 0;
  block.register_waiters.clear();
  block.registers_left = 0;
  for (auto& barrier : block.barriers) barrier = NamedBarrier();
  block.warps = teams("warp", threads, kWarpSize);
  block.warpgroup_teams = teams("warpgroup", threads, kWarpgroupSize);
  block.warpgroups.clear();
  for (size_t at = 0; at < block.warpgroup_teams.size(); ++at) {
    block.warpgroups.push_back(std::make_unique<Warpgroup>());
    block.warpgroups.back()->registers = std::min(kMostRegisters, kPool / threads / 8 * 8);
  }
  block.priority.assign(block.warps.size(), 0);
  for (int& priority : block.priority) priority = any_order ? static_cast<int>(random.below(kWarpSize)) : 0;
  for (int each = 0; each < threads; ++each) start_thread(block.threads[static_cast<size_t>(each)], block, each);
}

void Machine::start_thread(Thread& thread, Block& block, int number) {
  thread.block = &block;
  thread.number = number;
  thread.index = {static_cast<unsigned>(number), 0, 0};
  thread.finished = false;
  thread.instruction = "the kernel";
  thread.operand_name = nullptr;
  for (auto* open : {&thread.open_copies, &thread.open_bulk}) open->clear();
  for (auto* groups : {&thread.copies, &thread.bulk}) groups->clear();
  thread.knows = Knowledge();
  if (options.checks) {
    thread.knows.seen.assign(static_cast<size_t>(threads) + kEngines, 0);
    thread.knows.fenced = thread.knows.seen;
    thread.knows.seen[static_cast<size_t>(number)] = 1;
  }
  thread.fiber.start(entry);
  make_ready(&thread);
}

void Machine::entry() {
  Fiber::entered(machine->main_);
  machine->body();
  machine->finish_thread();
}

void Machine::finish_thread() {
  Thread& thread = *running;
  Block& block = *thread.block;
  thread.instruction = "exit";
  const auto leave = [&](Team& team) {
    if (team.arrived != 0) {
      fail(thread, std::string("exits while others of its ") + team.name + " wait in " + team.instruction);
    }
    ++team.exited;
  };
  leave(own_warp());
  const auto warpgroup = static_cast<size_t>(thread.number / kWarpgroupSize);
  if (warpgroup < block.warpgroup_teams.size()) leave(block.warpgroup_teams[warpgroup]);
  if (const Copy* copy = unfinished(thread)) {
    fail(thread, std::string("exits with a ") + copy->instruction + " in flight that was never waited for");
  }
  thread.finished = true;
  progress();
  Thread* next = nullptr;
  if (--block.live == 0) {
    finish_block(thread);
  } else {
    next = pick();
  }
  running = next;
  thread.fiber.switch_to(next != nullptr ? next->fiber : main_, true);
  std::abort();
}

void Machine::finish_block(const Thread& last) {
  Block& block = *last.block;
  for (auto& group : block.warpgroups) {
    if (!group->idle()) fail(last, "the block ends with a wgmma in flight");
  }
  for (size_t id = 0; id < std::size(block.barriers); ++id) {
    if (const int arrived = block.barriers[id].arrived; arrived != 0) {
      fail(last, "the block ends while " + std::to_string(arrived) + " threads have arrived at barrier " +
                     std::to_string(id) + ", which " + std::to_string(block.barriers[id].threads) + " complete");
    }
  }
  const std::string left = unobserved(block);
  if (!left.empty()) fail(last, left);
  // What has read shared memory may write global memory after the block's end: now, at the latest.
  for (size_t at = 0; at < in_flight.size();) {
    const auto copy = in_flight[at];
    if (copy->block != &block) {
      ++at;
    } else {
      advance(copy);
    }
  }
  --live_blocks_;
  free_.push_back(&block);
}

}  // namespace fastattn::sim
