// Named barriers and setmaxnreg: threads of a block that wait for one another.
#include "instructions.h"
#include "machine.h"
#include "threads.h"
#include "wgmma_state.h"

namespace fastattn::sim {

namespace {

// True when the last one has arrived: everybody goes on.
bool arrive(const char* instruction, int id, int threads) {
  Thread& thread = enter(instruction);
  if (id < 0 || id > 15) fail("barrier " + std::to_string(id) + ": a block has barriers 0 to 15");
  if (threads <= 0 || threads % kWarpSize != 0 || threads > machine->threads) {
    fail("a count of " + std::to_string(threads) + " threads: whole warps, at most the block's " +
         std::to_string(machine->threads));
  }
  NamedBarrier& barrier = thread.block->barriers[id];
  if (barrier.arrived != 0 && barrier.threads != threads) {
    fail("barrier " + std::to_string(id) + " with " + std::to_string(threads) + " threads, and others came with " +
         std::to_string(barrier.threads));
  }
  machine->progress();
  barrier.threads = threads;
  if (machine->options.checks) {
    barrier.gathered.take(thread.knows);
    ++thread.knows.seen[static_cast<size_t>(thread.number)];
  }
  if (++barrier.arrived < threads) return false;
  for (Thread* waiter : barrier.waiters) {
    if (machine->options.checks) waiter->knows.take(barrier.gathered);
    machine->make_ready(waiter);
  }
  return true;
}

}  // namespace

void barrier_sync(int id, int threads) {
  Thread& thread = self();
  const bool last = arrive("barrier.sync", id, threads);
  NamedBarrier& barrier = thread.block->barriers[id];
  if (!last) {
    barrier.waiters.push_back(&thread);
    thread.operand_name = "barrier";
    thread.operand = static_cast<uint32_t>(id);
    machine->wait("barrier.sync");
    thread.operand_name = nullptr;
    return;
  }
  if (machine->options.checks) thread.knows.take(barrier.gathered);
  barrier = NamedBarrier();
}

void barrier_arrive(int id, int threads) {
  if (arrive("barrier.arrive", id, threads)) self().block->barriers[id] = NamedBarrier();
}

void sync_block() { barrier_sync(0, machine->threads); }

void registers_set(int count, bool grow) {
  const char* instruction = grow ? "setmaxnreg.inc" : "setmaxnreg.dec";
  Team& team = own_warpgroup(instruction);
  Thread& thread = self();
  Block& block = *thread.block;
  Warpgroup& group = warpgroup_of(block, team);
  struct Call {
    int count;
    bool grow;
  } own{count, grow};
  if (grow) {
    while (count - group.registers > block.registers_left) {  // somebody else may take them first
      block.register_waiters.push_back(&thread);
      thread.operand_name = "registers";
      thread.operand = static_cast<uint32_t>(count);
      machine->wait(instruction);
      thread.operand_name = nullptr;
    }
  }
  together(team, instruction, &own, [](Block& in, Team& members) {
    Warpgroup& changed = warpgroup_of(in, members);
    const auto& first = *static_cast<Call*>(members.arguments[0]);
    for (void* each : members.arguments) {
      if (static_cast<Call*>(each)->count != first.count) fail("threads of the warpgroup ask for different counts");
    }
    // Where its first call grows to fewer than the launch allows, ptxas has the kernel launched with that many.
    if (first.grow ? changed.shared_out && first.count < changed.registers : first.count > changed.registers) {
      fail("the warpgroup has " + std::to_string(changed.registers) + " registers a thread, and " +
           (first.grow ? "grows to " : "shrinks to ") + std::to_string(first.count));
    }
    if (!first.grow || first.count > changed.registers) in.registers_left += changed.registers - first.count;
    changed.shared_out = true;
    if (in.registers_left < 0) fail("the registers that were free are taken by another warpgroup");
    changed.registers = first.count;
    for (Thread* waiter : in.register_waiters) machine->make_ready(waiter);
    in.register_waiters.clear();
  });
}

}  // namespace fastattn::sim
