#include "machine.h"

#include <cstdlib>
#include <cstring>

#include "instructions.h"
#include "threads.h"
#include "wgmma_state.h"

namespace fastattn::sim {

Machine* machine = nullptr;

Options& options() {
  static Options chosen;
  return chosen;
}

namespace {

constexpr uint64_t kLivelock = 1 << 20;  // turns without any change
constexpr uint64_t kRedraw = 256;        // turns that a draw of priorities lasts
constexpr int kMostPlaces = 24;          // that a report of a deadlock names in a block
constexpr int kPool = 65536;             // registers of a block that launches with all of them
constexpr int kMostRegisters = 256;

}  // namespace

Block::Block(int thread_count, int shared_bytes)
    : threads(std::make_unique<Thread[]>(static_cast<size_t>(thread_count))), shared(shared_bytes) {}

Block::~Block() = default;

Machine::Machine(dim3 grid_size, int thread_count, int bytes, const std::function<void()>& kernel,
                 const Options& chosen)
    : grid(grid_size), threads(thread_count), shared_bytes(bytes), body(kernel), options(chosen), random(chosen.seed) {
  total_blocks_ = uint64_t{grid.x} * grid.y * grid.z;
  if (options.order == Order::kRandom) {
    constexpr uint64_t kChances[] = {0, 1, 2, 16};  // never before they must, always at once, and between
    early_ = kChances[random.below(4)];
  }
}

Machine::~Machine() = default;

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

void Machine::make_ready(Thread* thread) {
  progress();
  ready_.push_back(thread);
}

void Machine::wait(const char* instruction) {
  Thread* thread = running;
  thread->instruction = instruction;
  Thread* next = pick();
  if (next == thread) return;
  running = next;
  thread->fiber.switch_to(next != nullptr ? next->fiber : main_);
  running = thread;
}

void Machine::issue(const std::shared_ptr<Copy>& copy) {
  ++copy->block->copies_in_flight;
  in_flight.push_back(copy);
  if (lands_early()) {
    while (!copy->done()) advance(copy);
  }
  if (!error.empty()) stop();
}

void Machine::advance(const std::shared_ptr<Copy>& copy) {
  progress();
  copy->steps[copy->next++]();
  if (!copy->done()) return;
  --copy->block->copies_in_flight;
  for (auto& each : in_flight) {
    if (each != copy) continue;
    std::swap(each, in_flight.back());
    in_flight.pop_back();
    return;
  }
}

void Machine::let_others_run() {
  ready_.push_back(running);  // and no progress: a thread that polls changes nothing
  wait(running->instruction);
}

void Machine::land_some() {
  const auto copy = in_flight[options.order == Order::kRandom ? random.below(in_flight.size()) : 0];
  advance(copy);
}

Thread* Machine::pick() {
  ++picks_;
  if (!in_flight.empty() && lands_early()) land_some();
  if (head_ == ready_.size() || ++idle_ > 2 * ready_.size() + 2 * static_cast<size_t>(threads)) {
    while (!in_flight.empty() && (head_ == ready_.size() || idle_ != 0)) land_some();  // nobody can go on without them
  }
  if (!error.empty() || head_ == ready_.size() || idle_ > kLivelock) return nullptr;
  if (options.order == Order::kRandom) {
    // The best of a few threads drawn: warps run ahead of others for a while, not all at the same pace.
    size_t best = 0;
    int highest = -1;
    for (int draw = 0; draw < 3; ++draw) {
      const size_t at = head_ + random.below(ready_.size() - head_);
      Block& block = *ready_[at]->block;
      int& priority = block.priority[static_cast<size_t>(ready_[at]->warp())];
      if (picks_ % kRedraw == 0) priority = static_cast<int>(random.below(kRedraw));
      if (priority > highest) {
        highest = priority;
        best = at;
      }
    }
    std::swap(ready_[head_], ready_[best]);
  }
  Thread* next = ready_[head_++];
  if (head_ == ready_.size()) {
    ready_.clear();
    head_ = 0;
  } else if (head_ > 4096) {
    ready_.erase(ready_.begin(), ready_.begin() + static_cast<ptrdiff_t>(head_));
    head_ = 0;
  }
  return next;
}

void Machine::entry() {
  Fiber::entered(machine->main_);
  machine->body();
  machine->finish_thread();
}

// Nobody has waited for it, wherever it may be by now.
void Machine::unfinished(Thread& thread, const Copy& copy) {
  if (!copy.waited) {
    fail(thread, std::string("exits with a ") + copy.instruction + " in flight that was never waited for");
  }
}

void Machine::finish_thread() {
  Thread& thread = *running;
  Block& block = *thread.block;
  thread.instruction = "exit";
  for (Team* team : {&own_warp(), thread.number / kWarpgroupSize < static_cast<int>(block.warpgroup_teams.size())
                                      ? &block.warpgroup_teams[static_cast<size_t>(thread.number / kWarpgroupSize)]
                                      : nullptr}) {
    if (team == nullptr) continue;
    if (team->arrived != 0) {
      fail(thread, std::string("exits while others of its ") + team->name + " wait in " + team->instruction);
    }
    ++team->exited;
  }
  for (const auto& copy : thread.open_copies) unfinished(thread, *copy);
  for (const auto* groups : {&thread.copies, &thread.bulk}) {
    for (const auto& group : *groups) {
      for (const auto& copy : group) unfinished(thread, *copy);
    }
  }
  if (!thread.open_bulk.empty()) {
    fail(thread, std::string("exits with a ") + thread.open_bulk[0]->instruction + " that was never committed");
  }
  thread.finished = true;
  progress();
  if (--block.live == 0) {
    for (auto& group : block.warpgroups) {
      if (!group->idle()) fail(thread, "the block ends with a wgmma in flight");
    }
    const std::string left = unobserved(block);
    if (!left.empty()) fail(thread, left);
    for (size_t at = 0; at < in_flight.size();) {
      const auto copy = in_flight[at];
      if (copy->block != &block) {
        ++at;
        continue;
      }
      if (copy->next == 0) {
        fail(block.threads[static_cast<size_t>(copy->issuer)],
             std::string("the block ends with a ") + copy->instruction + " in flight");
      }
      advance(copy);
    }
    --live_blocks_;
    free_.push_back(&block);
    running = nullptr;
    thread.fiber.switch_to(main_, true);
    std::abort();
  }
  Thread* next = pick();
  running = next;
  thread.fiber.switch_to(next != nullptr ? next->fiber : main_, true);
  std::abort();
}

void Machine::start_block(Block& block, uint64_t number) {
  block.index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                 static_cast<unsigned>(number / (uint64_t{grid.x} * grid.y))};
  std::memset(block.shared.begin(), 0xFF, static_cast<size_t>(shared_bytes));  // NaN
  block.shadow.reset(options.checks ? shared_bytes : 0);
  block.live = threads;
  block.mbarriers.clear();
  block.next_engine = 0;
  block.elected_lane = options.order == Order::kRandom ? static_cast<int>(random.below(kWarpSize)) : 0;
  block.register_waiters.clear();
  for (auto& barrier : block.barriers) barrier = NamedBarrier();
  const auto teams = [&](std::vector<Team>& of, const char* name, int size) {
    of.assign(static_cast<size_t>(threads / size), Team());
    for (size_t at = 0; at < of.size(); ++at) {
      of[at].name = name;
      of[at].first = static_cast<int>(at) * size;
      of[at].size = size;
      of[at].arguments.resize(static_cast<size_t>(size));
    }
  };
  teams(block.warps, "warp", kWarpSize);
  teams(block.warpgroup_teams, "warpgroup", kWarpgroupSize);
  block.warpgroups.clear();
  const int registers = std::min(kMostRegisters, kPool / threads / 8 * 8);
  for (size_t at = 0; at < block.warpgroup_teams.size(); ++at) {
    block.warpgroups.push_back(std::make_unique<Warpgroup>());
    block.warpgroups.back()->registers = registers;
  }
  block.registers_left = 0;
  block.priority.assign(block.warps.size(), 0);
  for (int number_in_block = 0; number_in_block < threads; ++number_in_block) {
    Thread& thread = block.threads[static_cast<size_t>(number_in_block)];
    thread.block = &block;
    thread.number = number_in_block;
    thread.index = {static_cast<unsigned>(number_in_block), 0, 0};
    thread.finished = false;
    thread.instruction = "the kernel";
    thread.operand_name = nullptr;
    for (auto* open : {&thread.open_copies, &thread.open_bulk}) open->clear();
    for (auto* groups : {&thread.copies, &thread.bulk}) groups->clear();
    thread.knows = Knowledge();
    if (options.checks) {
      thread.knows.seen.assign(static_cast<size_t>(threads) + kEngines, 0);
      thread.knows.fenced = thread.knows.seen;
      thread.knows.seen[static_cast<size_t>(number_in_block)] = 1;
    }
    thread.fiber.start(entry);
    make_ready(&thread);
  }
}

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

std::string name_of(const Thread& thread) {
  const uint3 at = thread.block->index;
  return "block " + std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) + " warp " +
         std::to_string(thread.warp()) + " lane " + std::to_string(thread.lane()) + " (thread " +
         std::to_string(thread.number) + ")";
}

std::string Machine::stuck() const {
  std::string said = idle_ > kLivelock ? "livelock: nothing changes while threads poll" : "deadlock";
  for (const auto& block : blocks_) {
    if (block->live == 0) continue;
    const uint3 at = block->index;
    said += "; block " + std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) + ":";
    const auto place = [&](int number) {
      const Thread& thread = block->threads[static_cast<size_t>(number)];
      if (thread.finished) return std::string("finished");
      std::string text = std::string("in ") + thread.instruction;
      if (thread.operand_name != nullptr) {
        text += std::string(" ") + thread.operand_name + " " + std::to_string(thread.operand);
      }
      const auto found = block->mbarriers.find(thread.operand);
      if (thread.operand_name != nullptr && found != block->mbarriers.end()) {
        text += " (phase " + std::to_string(found->second.phase) + ", " + std::to_string(found->second.pending) +
                " of " + std::to_string(found->second.count) + " arrivals and " + std::to_string(found->second.bytes) +
                " bytes to come)";
      }
      return text;
    };
    int places = 0;
    for (int first = 0; first < threads && places < kMostPlaces;) {
      int stop = first + 1;
      while (stop < threads && stop % kWarpSize != 0 && place(stop) == place(first)) ++stop;
      if (place(first) != "finished") {
        ++places;
        said += " warp " + std::to_string(first / kWarpSize) + " lanes " + std::to_string(first % kWarpSize) + "-" +
                std::to_string((stop - 1) % kWarpSize) + " " + place(first) + ",";
      }
      first = stop;
    }
    said.pop_back();
  }
  return said;
}

}  // namespace fastattn::sim
