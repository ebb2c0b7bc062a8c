// Shared memory: addresses, bounds, and the accesses that the checks hear of.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "instructions.h"
#include "machine.h"
#include "threads.h"

namespace fastattn::sim {

namespace {

std::string range(uint32_t address, size_t bytes) {
  return std::to_string(bytes) + " bytes at shared address " + std::to_string(address);
}

// Says what the shadow has found, naming both sides.
std::string words_of(const Shadow::Finding& found, const Block& block, uint8_t access, uint32_t address) {
  const std::string where = "shared address " + std::to_string(address) + " (byte " + std::to_string(found.offset) +
                            " of the block's memory)";
  const std::string does = (access & kWrite) != 0 ? "writes " : "reads ";
  if (found.unwritten) return "reads " + where + ", which nobody has written";
  const std::string who = found.actor < static_cast<uint32_t>(machine->threads)
                              ? name_of(block.threads[found.actor])
                              : std::string("an asynchronous operation");
  const std::string did = (found.access & kWrite) != 0 ? " wrote" : " read";
  const std::string other = who + did + " by " + found.instruction;
  if (found.unfenced) {
    return "missing fence_proxy_async: " + does + where + ", which " + other + " as ordinary memory";
  }
  return "race: " + does + where + ", which " + other + ", and nothing orders the two";
}

bool check(Thread& thread, uint32_t address, uint32_t bytes, uint8_t access, Stamp stamp, const Knowledge& knows,
           const char* instruction) {
  Shadow::Finding found;
  Block& block = *thread.block;
  if (block.shadow.check(address - kSharedWindow, bytes, access, stamp, knows, instruction, found)) return true;
  machine->fail(thread, words_of(found, block, access, found.offset + kSharedWindow));
}

}  // namespace

SharedMemory::SharedMemory(int size) : bytes_(static_cast<size_t>(size) + 2 * kSharedGuard) {
  void* all = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED) std::abort();
  memory_ = static_cast<char*>(all);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(memory_, kSharedGuard);
  __asan_poison_memory_region(memory_ + kSharedGuard + size, kSharedGuard);
#endif
}

SharedMemory::~SharedMemory() {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory_, bytes_);
#endif
  munmap(memory_, bytes_);
}

char* dynamic_shared() { return self().block->shared.begin(); }

uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const char*>(pointer) - self().block->shared.begin();
  if (offset < 0 || offset > machine->shared_bytes) {
    fail("a pointer that does not point into the block's shared memory");
  }
  return static_cast<uint32_t>(offset) + kSharedWindow;
}

uint32_t shared_offset(uint32_t address) { return address - kSharedWindow; }

char* shared_bytes_at(Block& block, uint32_t address, size_t bytes, size_t alignment) {
  if (address < kSharedWindow || address - kSharedWindow + bytes > static_cast<size_t>(machine->shared_bytes)) {
    fail("out of bounds: " + range(address, bytes) + ", and the block has " + std::to_string(machine->shared_bytes) +
         " from " + std::to_string(kSharedWindow));
  }
  if (address % alignment != 0) {
    fail("misaligned: " + range(address, bytes) + " want a multiple of " + std::to_string(alignment));
  }
  return block.shared.begin() + (address - kSharedWindow);
}

void own_access(uint32_t address, uint32_t bytes, uint8_t access) {
  Thread& thread = self();
  if (!thread.block->shadow.on()) return;
  const auto actor = static_cast<uint32_t>(thread.number);
  check(thread, address, bytes, access, {actor, thread.knows.seen[actor]}, thread.knows, thread.instruction);
}

void engine_access(Thread& thread, uint32_t address, uint32_t bytes, uint8_t access, Stamp stamp,
                   const Knowledge& knows) {
  for (const auto& each : thread.block->mbarriers) {
    if ((access & kWrite) != 0 && each.first + sizeof(uint64_t) > address && each.first < address + bytes) {
      fail("overwrites the mbarrier at shared address " + std::to_string(each.first));
    }
  }
  if (thread.block->shadow.on()) check(thread, address, bytes, access, stamp, knows, thread.instruction);
}

Stamp new_stamp(Block& block) {
  const uint32_t turn = block.next_engine++;
  return {static_cast<uint32_t>(machine->threads) + turn % kEngines, turn / kEngines + 1};
}

void see(Thread& thread, Stamp stamp) {
  if (!machine->options.checks) return;
  uint32_t& tick = thread.knows.seen[stamp.actor];
  tick = std::max(tick, stamp.tick);
}

void fence_proxy_async() {
  Thread& thread = enter("fence.proxy.async");
  for (auto& each : thread.block->mbarriers) each.second.announced = true;
  if (!machine->options.checks) return;
  thread.knows.fenced = thread.knows.seen;
  ++thread.knows.seen[static_cast<size_t>(thread.number)];  // what it writes from now on is not fenced
}

void fence_proxy_async_global() { enter("fence.proxy.async.global"); }

int load_acquire(const int* global) {
  enter("ld.acquire");
  machine->let_others_run();
  return *global;
}

void add_release(int* global, int value) {
  enter("red.release");
  machine->progress();
  *global += value;
}

// Called by the compiler's instrumentation and by atomics: an ordinary access through a pointer.
void plain_access(const void* pointer, size_t bytes, uint8_t access, const char* instruction) {
  if (machine == nullptr || machine->running == nullptr) return;
  Thread& thread = *machine->running;
  const ptrdiff_t offset = static_cast<const char*>(pointer) - thread.block->shared.begin();
  const ptrdiff_t size = machine->shared_bytes;
  if (offset < -kSharedGuard || offset >= size + kSharedGuard) return;
  const char* before = thread.instruction;
  thread.instruction = instruction;
  if (offset < 0 || offset + static_cast<ptrdiff_t>(bytes) > size) {
    fail("out of bounds: " + std::to_string(bytes) + " bytes at byte " + std::to_string(offset) + " of the block's " +
         std::to_string(size) + " bytes of shared memory");
  }
  own_access(static_cast<uint32_t>(offset) + kSharedWindow, static_cast<uint32_t>(bytes), access);
  thread.instruction = before;
}

void atomic_access(void* where, size_t bytes) {
  machine->progress();
  plain_access(where, bytes, kWrite | kAtomic, "an atomic operation");
}

void move_unseen(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }

}  // namespace fastattn::sim
