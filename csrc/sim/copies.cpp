// Asynchronous copies without a tensor map: cp.async by each thread, and runs of bytes by the copy engine.
#include <cstring>

#include "copies.h"
#include "instructions.h"
#include "machine.h"

namespace fastattn::sim {

namespace {

constexpr uint32_t kPiece = 16;  // bytes: what sizes and addresses are multiples of

bool aligned(const void* global) { return reinterpret_cast<uintptr_t>(global) % kPiece == 0; }

// Lands what is left of a group, now at the latest.
void finish(const CopyGroup& group, size_t steps) {
  for (const auto& copy : group) {
    while (!copy->done() && copy->next < steps) machine->advance(copy);
    copy->waited = true;
  }
}

}  // namespace

std::shared_ptr<Copy> new_copy(const char* instruction) {
  Thread& thread = self();
  auto copy = std::make_shared<Copy>();
  copy->instruction = instruction;
  copy->block = thread.block;
  copy->issuer = thread.number;
  copy->stamp = new_stamp(*thread.block);
  return copy;
}

void announced(uint32_t barrier) {
  Block& block = *self().block;
  if (!known_mbarrier(block, barrier).announced) {
    fail("missing mbarrier_init_fence: the copy engine does not know the mbarrier yet");
  }
  own_access(barrier, 8, kWrite | kAtomic);
}

void copy_async(uint32_t shared, const void* global, bool valid) {
  Thread& thread = enter("cp.async");
  char* to = shared_bytes_at(*thread.block, shared, kPiece, kPiece);
  if (!aligned(global)) fail("misaligned: the global address is no multiple of 16");
  auto copy = new_copy("cp.async");
  engine_access(thread, shared, kPiece, kWrite, copy->stamp, thread.knows);
  copy->steps.push_back([to, global, valid] {
    if (valid) {
      std::memcpy(to, global, kPiece);
    } else {
      std::memset(to, 0, kPiece);
    }
  });
  thread.open_copies.push_back(copy);
  machine->issue(copy);
}

void copy_async_commit() {
  Thread& thread = enter("cp.async.commit_group");
  thread.copies.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}

void copy_async_wait(int pending) {
  Thread& thread = enter("cp.async.wait_group");
  while (static_cast<int>(thread.copies.size()) > pending) {
    finish(thread.copies.front(), 1);
    for (const auto& copy : thread.copies.front()) see(thread, copy->stamp);
    thread.copies.erase(thread.copies.begin());
  }
}

void copy_async_arrive(uint32_t barrier) {
  Thread& thread = enter("cp.async.mbarrier.arrive");
  Block& block = *thread.block;
  Mbarrier& counted = known_mbarrier(block, barrier);
  counted.loaded = counted.phase + 1;
  CopyGroup before = thread.open_copies;
  for (const auto& group : thread.copies) before.insert(before.end(), group.begin(), group.end());
  std::vector<Stamp> stamps;
  for (const auto& each : before) stamps.push_back(each->stamp);
  // The thread's waits are the mbarrier's from here on.
  thread.open_copies.clear();
  thread.copies.clear();
  auto arrival = new_copy("cp.async.mbarrier.arrive");
  arrival->steps.push_back([before, stamps, barrier, own = arrival.get()] {
    finish(before, 1);
    copies_arrive(*own, barrier, stamps);
  });
  machine->issue(arrival);
}

void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  Thread& thread = enter("cp.async.bulk");
  Block& block = *thread.block;
  char* to = shared_bytes_at(block, shared, bytes, kPiece);
  if (!aligned(global) || bytes % kPiece != 0) fail("misaligned: the global address and the size are multiples of 16");
  announced(barrier);
  auto copy = new_copy("cp.async.bulk");
  engine_access(thread, shared, bytes, kWrite | kAsync, copy->stamp, thread.knows);
  copy->steps.push_back([to, global, bytes, barrier, &block, stamp = copy->stamp] {
    std::memcpy(to, global, bytes);
    land_bytes(block, barrier, bytes, stamp);
  });
  machine->issue(copy);
}

void bulk_store(void* global, uint32_t shared, uint32_t bytes, bool add) {
  const char* instruction = add ? "cp.reduce.async.bulk" : "cp.async.bulk";
  Thread& thread = enter(instruction);
  const char* from = shared_bytes_at(*thread.block, shared, bytes, kPiece);
  if (!aligned(global) || bytes % kPiece != 0) fail("misaligned: the global address and the size are multiples of 16");
  auto copy = new_copy(instruction);
  engine_access(thread, shared, bytes, kRead | kAsync, copy->stamp, thread.knows);
  auto taken = std::make_shared<std::vector<char>>(bytes);
  copy->steps.push_back([taken, from, bytes] { std::memcpy(taken->data(), from, bytes); });
  copy->steps.push_back([taken, global, bytes, add] {
    if (!add) {
      std::memcpy(global, taken->data(), bytes);
      return;
    }
    auto* sums = static_cast<float*>(global);
    for (uint32_t at = 0; at < bytes / sizeof(float); ++at) {
      float term;
      std::memcpy(&term, taken->data() + at * sizeof term, sizeof term);
      sums[at] += term;
    }
  });
  thread.open_bulk.push_back(copy);
  machine->issue(copy);
}

void bulk_commit() {
  Thread& thread = enter("cp.async.bulk.commit_group");
  thread.bulk.push_back(std::move(thread.open_bulk));
  thread.open_bulk.clear();
}

void bulk_wait(int pending, bool read_only) {
  Thread& thread = enter("cp.async.bulk.wait_group");
  const size_t most = thread.bulk.size();
  for (size_t at = 0; at + static_cast<size_t>(pending) < most; ++at) {
    finish(thread.bulk[at], read_only ? 1 : 2);
    for (const auto& copy : thread.bulk[at]) see(thread, copy->stamp);
  }
  if (read_only) return;
  while (static_cast<int>(thread.bulk.size()) > pending) thread.bulk.erase(thread.bulk.begin());
}

}  // namespace fastattn::sim
