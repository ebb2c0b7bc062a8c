// Stores to global memory that are one instruction (arch/global.h), and how many sectors each writes.
//
// Memory is written in sectors of 32 bytes. What one instruction of a warp writes of a sector is one request: a sector
// that several instructions write in parts is sent several times. Lanes run one after the other here, so the stores of
// a warp that are one instruction are found by the place in the kernel that they come from.
#include <cstring>

#include "instructions.h"
#include "machine.h"

namespace fastattn::sim {

namespace {

constexpr uintptr_t kSector = 32;  // bytes

struct Written {
  uint64_t bytes = 0, sectors = 0;
};
std::map<size_t, Written> written;  // by what a lane stores at a time, 4, 8 or 16 bytes

}  // namespace

// Not inlined, so that the address it returns to is the store's place in the kernel.
__attribute__((noinline)) void store_global(void* global, const void* value, size_t bytes) {
  const void* place = __builtin_return_address(0);
  const Thread& thread = enter("st.global");
  const auto address = reinterpret_cast<uintptr_t>(global);
  if (address % bytes != 0) fail("misaligned: the global address is no multiple of " + std::to_string(bytes));
  std::memcpy(global, value, bytes);
  Stores& stores = own_warp().stores;
  const int time = stores.times[{place, thread.lane()}]++;
  Written& sum = written[bytes];
  sum.bytes += bytes;
  sum.sectors += stores.sectors.insert({place, time, address / kSector}).second ? 1 : 0;
}

}  // namespace fastattn::sim

// Of the stores of `lane_bytes` bytes a lane since this was last asked: their bytes, and the sectors they were sent in.
extern "C" __attribute__((visibility("default"))) void fastattn_sim_stored(uint64_t lane_bytes, uint64_t* bytes,
                                                                           uint64_t* sectors) {
  fastattn::sim::Written& sum = fastattn::sim::written[lane_bytes];
  *bytes = sum.bytes;
  *sectors = sum.sectors;
  sum = fastattn::sim::Written();
}
