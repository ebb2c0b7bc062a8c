// What -fsanitize=thread makes of each load and store of a kernel: a call. Here it is answered by the simulator's own
// detector, which knows CUDA's barriers and proxies, and no runtime of ThreadSanitizer is linked.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "options.h"
#include "plain.h"
#include "shadow.h"

using fastattn::sim::kRead;
using fastattn::sim::kWrite;

namespace {

void load(const void* pointer, size_t bytes) { fastattn::sim::plain_access(pointer, bytes, kRead, "a load"); }
void store(const void* pointer, size_t bytes) { fastattn::sim::plain_access(pointer, bytes, kWrite, "a store"); }

}  // namespace

#define FASTATTN_HOOK __attribute__((visibility("hidden"))) void

extern "C" {

// Called when the library is loaded: it was compiled for the checks.
FASTATTN_HOOK __tsan_init() { fastattn::sim::options().checks = true; }

FASTATTN_HOOK __tsan_func_entry(void*) {}
FASTATTN_HOOK __tsan_func_exit() {}
FASTATTN_HOOK __tsan_vptr_update(void**, void*) {}
FASTATTN_HOOK __tsan_vptr_read(void**) {}

#define FASTATTN_SIZE(bytes)                                                            \
  FASTATTN_HOOK __tsan_read##bytes(void* pointer) { load(pointer, bytes); }             \
  FASTATTN_HOOK __tsan_write##bytes(void* pointer) { store(pointer, bytes); }           \
  FASTATTN_HOOK __tsan_unaligned_read##bytes(void* pointer) { load(pointer, bytes); }   \
  FASTATTN_HOOK __tsan_unaligned_write##bytes(void* pointer) { store(pointer, bytes); } \
  FASTATTN_HOOK __tsan_volatile_read##bytes(void* pointer) { load(pointer, bytes); }    \
  FASTATTN_HOOK __tsan_volatile_write##bytes(void* pointer) { store(pointer, bytes); }

FASTATTN_SIZE(1)
FASTATTN_SIZE(2)
FASTATTN_SIZE(4)
FASTATTN_SIZE(8)
FASTATTN_SIZE(16)
#undef FASTATTN_SIZE

FASTATTN_HOOK __tsan_read_range(void* pointer, size_t bytes) { load(pointer, bytes); }
FASTATTN_HOOK __tsan_write_range(void* pointer, size_t bytes) { store(pointer, bytes); }

// clang's, for what it copies or fills by a call.
FASTATTN_HOOK* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  load(from, bytes);
  store(to, bytes);
  return std::memcpy(to, from, bytes);
}
FASTATTN_HOOK* __tsan_memmove(void* to, const void* from, size_t bytes) {
  load(from, bytes);
  store(to, bytes);
  return std::memmove(to, from, bytes);
}
FASTATTN_HOOK* __tsan_memset(void* to, int value, size_t bytes) {
  store(to, bytes);
  return std::memset(to, value, bytes);
}

}  // extern "C"
