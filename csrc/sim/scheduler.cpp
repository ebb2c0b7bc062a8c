// Who runs next, and when copies land.
#include "machine.h"

namespace fastattn::sim {

namespace {

constexpr uint64_t kLivelock = 1 << 20;  // turns without any change
constexpr uint64_t kRedraw = 64;         // turns that a warp's priority lasts
constexpr int kDraws = 3;                // threads that compete for a turn

}  // namespace

void Machine::make_ready(Thread* thread) {
  progress();
  ready_.push_back(thread);
}

bool Machine::livelocked() const { return idle_ > kLivelock; }

void Machine::wait(const char* instruction) {
  Thread* thread = running;
  thread->instruction = instruction;
  Thread* next = pick();
  if (next == thread) return;
  running = next;
  thread->fiber.switch_to(next != nullptr ? next->fiber : main_);
  running = thread;
}

void Machine::let_others_run() {
  ready_.push_back(running);  // and no progress: a thread that polls changes nothing
  wait(running->instruction);
}

void Machine::issue(const std::shared_ptr<Copy>& copy) {
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
  for (auto& each : in_flight) {
    if (each != copy) continue;
    std::swap(each, in_flight.back());
    in_flight.pop_back();
    return;
  }
}

void Machine::land_some() {
  const auto copy = in_flight[options.order == Order::kRandom ? random.below(in_flight.size()) : 0];
  advance(copy);
}

// Where in the list of ready threads the next one stands.
size_t Machine::draw() {
  if (options.order == Order::kFixed) return head_;
  size_t best = 0;
  int highest = -1;
  for (int each = 0; each < (skewed_ ? kDraws : 1); ++each) {
    const size_t at = head_ + random.below(ready_.size() - head_);
    int& priority = ready_[at]->block->priority[static_cast<size_t>(ready_[at]->warp())];
    if (picks_ % kRedraw == 0) priority = static_cast<int>(random.below(kRedraw));
    if (priority > highest) {
      highest = priority;
      best = at;
    }
  }
  return best;
}

Thread* Machine::pick() {
  ++picks_;
  if (!in_flight.empty() && lands_early()) land_some();
  // Nobody can go on without the copies, or all who could have polled in vain.
  const bool in_vain = ++idle_ > 2 * (ready_.size() + static_cast<size_t>(threads));
  if (in_vain && !in_flight.empty()) land_some();
  while (head_ == ready_.size() && !in_flight.empty()) land_some();
  if (!error.empty() || head_ == ready_.size() || livelocked()) return nullptr;
  std::swap(ready_[head_], ready_[draw()]);
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

}  // namespace fastattn::sim
