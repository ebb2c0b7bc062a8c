// Instructions that a warp or a warpgroup executes together, and the words of threads.h.
#include <cstring>

#include "instructions.h"
#include "machine.h"
#include "threads.h"

namespace fastattn::sim {

namespace {

std::string lane_of(const Team& team, int slot) {
  return "lane " + std::to_string((team.first + slot) % kWarpSize) + " of warp " +
         std::to_string((team.first + slot) / kWarpSize);
}

void whole(unsigned mask) {
  if (mask != 0xffffffffu) fail("a mask other than 0xffffffff: warps are whole here");
}

struct Shuffle {
  void* value;
  size_t bytes;
  int from;
};

struct Ballot {
  bool predicate;
  unsigned votes;
};

void no_work(Block&, Team&) {}

}  // namespace

void together(Team& team, const char* instruction, void* argument, Perform perform) {
  Thread& thread = enter(instruction);
  const int slot = thread.number - team.first;
  if (team.exited != 0) {
    fail(std::string("divergence: some of the ") + team.name + " have exited, and all must execute it");
  }
  if (team.arrived != 0 && std::strcmp(team.instruction, instruction) != 0) {
    int other = 0;
    while (team.arguments[static_cast<size_t>(other)] == nullptr) ++other;
    fail(std::string("divergence: ") + lane_of(team, other) + " waits in " + team.instruction + ", and the " +
         team.name + " must execute the same");
  }
  team.instruction = instruction;
  team.arguments[static_cast<size_t>(slot)] = argument != nullptr ? argument : &thread;
  machine->progress();
  if (++team.arrived < team.size) {
    machine->wait(instruction);
    return;
  }
  perform(*thread.block, team);
  team.arrived = 0;
  team.stores = Stores();
  for (int each = 0; each < team.size; ++each) {
    team.arguments[static_cast<size_t>(each)] = nullptr;
    Thread& member = thread.block->threads[static_cast<size_t>(team.first + each)];
    if (&member != &thread) machine->make_ready(&member);
  }
}

Team& own_warpgroup(const char* instruction) {
  Thread& thread = enter(instruction);
  const auto group = static_cast<size_t>(thread.number / kWarpgroupSize);
  if (group >= thread.block->warpgroup_teams.size()) fail("the warp is in no whole warpgroup");
  return thread.block->warpgroup_teams[group];
}

Warpgroup& warpgroup_of(Block& block, const Team& team) {
  return *block.warpgroups[static_cast<size_t>(team.first / kWarpgroupSize)];
}

uint3 thread_index() { return self().index; }
uint3 block_index() { return self().block->index; }
dim3 block_size() { return dim3(static_cast<unsigned>(machine->threads)); }
dim3 grid_size() { return machine->grid; }
int lane() { return self().lane(); }

void let_others_run(const char* instruction) {
  enter(instruction);
  machine->let_others_run();
}

void sync_warp(unsigned mask) {
  enter("__syncwarp");
  whole(mask);
  together(own_warp(), "__syncwarp", nullptr, [](Block& block, Team& team) {
    if (!machine->options.checks) return;
    Knowledge all;
    for (int each = 0; each < team.size; ++each) all.take(block.threads[static_cast<size_t>(team.first + each)].knows);
    for (int each = 0; each < team.size; ++each) {
      Thread& member = block.threads[static_cast<size_t>(team.first + each)];
      member.knows.take(all);
      ++member.knows.seen[static_cast<size_t>(member.number)];
    }
  });
}

void shuffle(unsigned mask, void* value, size_t bytes, int from, const char* instruction) {
  enter(instruction);
  whole(mask);
  Shuffle own{value, bytes, from};
  together(own_warp(), instruction, &own, [](Block&, Team& team) {
    constexpr size_t kMost = 16;
    unsigned char before[kWarpSize][kMost];
    for (int each = 0; each < kWarpSize; ++each) {
      const auto& call = *static_cast<Shuffle*>(team.arguments[static_cast<size_t>(each)]);
      if (call.bytes > kMost) fail("a value of more than 16 bytes");
      std::memcpy(before[each], call.value, call.bytes);
    }
    for (int each = 0; each < kWarpSize; ++each) {
      const auto& call = *static_cast<Shuffle*>(team.arguments[static_cast<size_t>(each)]);
      std::memcpy(call.value, before[call.from], call.bytes);
    }
  });
}

unsigned ballot(unsigned mask, bool predicate) {
  enter("__ballot_sync");
  whole(mask);
  Ballot own{predicate, 0};
  together(own_warp(), "__ballot_sync", &own, [](Block&, Team& team) {
    unsigned votes = 0;
    for (int each = 0; each < kWarpSize; ++each) {
      votes |= unsigned{static_cast<Ballot*>(team.arguments[static_cast<size_t>(each)])->predicate} << each;
    }
    for (void* call : team.arguments) static_cast<Ballot*>(call)->votes = votes;
  });
  return own.votes;
}

bool elect_one() {
  together(own_warp(), "elect.sync", nullptr, no_work);
  return self().lane() == self().block->elected_lane;
}

}  // namespace fastattn::sim
