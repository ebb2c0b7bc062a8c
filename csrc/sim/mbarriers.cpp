// mbarriers: phases of arrivals and landed bytes.
#include "instructions.h"
#include "machine.h"

namespace fastattn::sim {

namespace {

constexpr uint32_t kBytes = 8;
constexpr int kMostArrivals = (1 << 20) - 1;
constexpr int64_t kMostBytes = (1 << 20) - 1;  // of a phase, to land

Mbarrier& mbarrier_at(uint32_t address) {
  Block& block = *self().block;
  shared_bytes_at(block, address, kBytes, kBytes);
  Mbarrier& barrier = known_mbarrier(block, address);
  const Stamp made = barrier.made;
  if (machine->options.checks && self().knows.seen[made.actor] < made.tick) {
    fail("race: the mbarrier was initialised by " + name_of(block.threads[made.actor]) +
         ", and nothing orders the two");
  }
  own_access(address, kBytes, kWrite | kAtomic);
  return barrier;
}

// Ends the phase if all it waits for has come.
void settle(Mbarrier& barrier) {
  machine->progress();
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.published = barrier.gathered;
  for (Thread* waiter : barrier.waiters) machine->make_ready(waiter);
  barrier.waiters.clear();
}

std::string too_many(const Mbarrier& barrier) {
  return "more arrivals than the " + std::to_string(barrier.count) + " that its phase counts";
}

// Who waits for the phase comes after this operation of a copy engine.
void publish(Mbarrier& barrier, Stamp stamp) {
  if (!machine->options.checks) return;
  Clock& seen = barrier.gathered.seen;
  if (seen.size() <= stamp.actor) seen.resize(stamp.actor + 1);
  seen[stamp.actor] = std::max(seen[stamp.actor], stamp.tick);
}

void arrive(Mbarrier& barrier) {
  if (barrier.pending == 0) fail(too_many(barrier));
  if (machine->options.checks) {
    Thread& thread = self();
    barrier.gathered.take(thread.knows);
    ++thread.knows.seen[static_cast<size_t>(thread.number)];
  }
  --barrier.pending;
}

void expect(Mbarrier& barrier, uint32_t bytes) {
  barrier.bytes += bytes;
  if (barrier.bytes > kMostBytes) {
    fail(std::to_string(barrier.bytes) + " bytes to land in one phase: it counts up to 1048575");
  }
  barrier.loaded = barrier.phase + 1;
}

bool ended(Mbarrier& barrier, uint32_t parity) {
  if (parity > 1) fail("a parity of " + std::to_string(parity) + ": it is 0 or 1");
  if ((barrier.phase & 1) == parity) return false;
  barrier.observed = barrier.phase;
  if (machine->options.checks) self().knows.take(barrier.published);
  return true;
}

}  // namespace

Mbarrier& known_mbarrier(Block& block, uint32_t address) {
  const auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end()) fail("no mbarrier was initialised at shared address " + std::to_string(address));
  return found->second;
}

void mbarrier_init(uint32_t address, int count) {
  enter("mbarrier.init");
  if (count < 1 || count > kMostArrivals) fail("a count of " + std::to_string(count) + ": it is 1 to 1048575");
  Block& block = *self().block;
  shared_bytes_at(block, address, kBytes, kBytes);
  if (block.mbarriers.count(address) != 0) fail("the mbarrier is initialised already");
  own_access(address, kBytes, kWrite);
  Mbarrier& barrier = block.mbarriers[address];
  barrier.count = barrier.pending = count;
  if (!machine->options.checks) return;
  const auto actor = static_cast<uint32_t>(self().number);
  barrier.made = {actor, self().knows.seen[actor]};
}

void mbarrier_invalidate(uint32_t address) {
  enter("mbarrier.inval");
  if (!mbarrier_at(address).waiters.empty()) fail("threads wait for the mbarrier");
  own_access(address, kBytes, kWrite);
  self().block->mbarriers.erase(address);
}

void mbarrier_init_fence() {
  enter("fence.mbarrier_init");
  for (auto& each : self().block->mbarriers) each.second.announced = true;
}

void mbarrier_arrive(uint32_t address) {
  enter("mbarrier.arrive");
  Mbarrier& barrier = mbarrier_at(address);
  arrive(barrier);
  settle(barrier);
}

void mbarrier_arrive_expect(uint32_t address, uint32_t bytes) {
  enter("mbarrier.arrive.expect_tx");
  Mbarrier& barrier = mbarrier_at(address);
  expect(barrier, bytes);
  arrive(barrier);
  settle(barrier);
}

void mbarrier_expect(uint32_t address, uint32_t bytes) {
  enter("mbarrier.expect_tx");
  expect(mbarrier_at(address), bytes);
}

bool mbarrier_try_wait(uint32_t address, uint32_t parity) {
  enter("mbarrier.try_wait");
  if (ended(mbarrier_at(address), parity)) return true;
  machine->let_others_run();
  enter("mbarrier.try_wait");
  return ended(mbarrier_at(address), parity);
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  Thread& thread = enter("mbarrier.try_wait");
  for (;;) {
    Mbarrier& barrier = mbarrier_at(address);
    if (ended(barrier, parity)) return;
    barrier.waiters.push_back(&thread);
    thread.operand_name = parity == 0 ? "for parity 0 of the mbarrier at" : "for parity 1 of the mbarrier at";
    thread.operand = address;
    machine->wait("mbarrier.try_wait");
    thread.operand_name = nullptr;
  }
}

std::string unobserved(const Block& block) {
  for (const auto& each : block.mbarriers) {
    if (each.second.loaded > each.second.observed) {
      return "the block ends with a copy in flight: nobody has waited for its bytes at the mbarrier at " +
             std::to_string(each.first);
    }
  }
  return {};
}

void land_bytes(Block& block, uint32_t address, uint32_t bytes, Stamp stamp) {
  const auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end()) return;  // it was there when the copy was issued, and has been invalidated since
  publish(found->second, stamp);
  found->second.bytes -= bytes;
  settle(found->second);
}

void copies_arrive(const Copy& arrival, uint32_t address, const std::vector<Stamp>& stamps) {
  const auto found = arrival.block->mbarriers.find(address);
  if (found == arrival.block->mbarriers.end()) return;
  Mbarrier& barrier = found->second;
  if (barrier.pending == 0) {
    machine->blame(arrival.block->threads[static_cast<size_t>(arrival.issuer)], arrival.instruction, too_many(barrier));
    return;
  }
  for (const Stamp stamp : stamps) publish(barrier, stamp);
  --barrier.pending;
  settle(barrier);
}

}  // namespace fastattn::sim
