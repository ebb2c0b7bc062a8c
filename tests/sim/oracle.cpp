// What the simulator takes fragments and layouts of shared memory to be, against CuTe's own (CUTLASS), on the host.
// Prints a line a comparison: its name and how many places differ.
#include <cstdio>

#include <cute/tensor.hpp>
// After the one above, which the others need first.
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/copy_atom.hpp>
#include <cute/pointer_flagged.hpp>

#include "../../csrc/sim/descriptor.h"
#include "../../csrc/sim/fragments.h"

namespace {

using namespace cute;
using Half = cutlass::bfloat16_t;
namespace sim = fastattn::sim;

void say(const char* name, int differ) { std::printf("%s: %d\n", name, differ); }

// CuTe numbers the elements of an [rows, ...] matrix down its columns.
template <class Layout, class Expected>
int differ(Layout layout, int threads, int values, int rows, Expected expected) {
  int count = 0;
  for (int thread = 0; thread < threads; ++thread) {
    for (int i = 0; i < values; ++i) {
      const sim::Place at = expected(thread, i);
      count += static_cast<int>(layout(thread, i)) != at.row + rows * at.column;
    }
  }
  return count;
}

sim::Place transposed(sim::Place at) { return {at.column, at.row}; }

// A tile of [mns, 64] in shared memory from byte 0, as a descriptor with these distances addresses it: sixteen ks at a
// time, `step` bytes apart.
template <class Layout>
int differ_in_memory(Layout layout, bool mn_major, uint32_t mns, uint64_t swizzle, uint32_t stride, uint32_t leading,
                     uint32_t step) {
  const auto flat = as_position_independent_swizzle_layout(layout);
  int count = 0;
  for (uint32_t k0 = 0; k0 < 64; k0 += 16) {
    const sim::Descriptor at(swizzle << 62 | uint64_t{stride >> 4} << 32 | uint64_t{leading >> 4} << 16 |
                             k0 / 16 * step >> 4);
    for (uint32_t mn = 0; mn < mns; ++mn) {
      for (uint32_t k = 0; k < 16; ++k) {
        const uint32_t byte = mn_major ? at.mn_major(k, mn / 8) + mn % 8 * 2 : at.k_major(mn, k / 8) + k % 8 * 2;
        count += static_cast<uint32_t>(flat(static_cast<int>(mn), static_cast<int>(k0 + k))) * 2 != byte;
      }
    }
  }
  return count;
}

}  // namespace

int main() {
  using Product = MMA_Traits<SM90_64x64x16_F32BF16BF16_RS<GMMA::Major::K, GMMA::Major::MN>>;
  say("wgmma accumulator", differ(Product::CLayout{}, 128, 32, 64, sim::accumulator));
  say("wgmma A fragment", differ(Product::ALayout{}, 128, 8, 64, sim::a_fragment));
  using Wide = MMA_Traits<SM90_64x192x16_F32BF16BF16_SS<GMMA::Major::K, GMMA::Major::K>>;
  say("wgmma accumulator, n 192", differ(Wide::CLayout{}, 128, 96, 64, sim::accumulator));
  using Small = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
  say("mma accumulator", differ(Small::CLayout{}, 32, 4, 16, sim::accumulator));
  say("mma A fragment", differ(Small::ALayout{}, 32, 8, 16, sim::a_fragment));
  say("mma B fragment",
      differ(Small::BLayout{}, 32, 4, 8, [](int lane, int i) { return transposed(sim::b_fragment(lane, i)); }));

  const auto square = [](auto atom) { return tile_to_shape(atom, Shape<_64, _64>{}); };
  // The descriptor's number of each swizzle: 1 of 128 bytes, 2 of 64, 3 of 32, 0 none.
  say("K-major, 128", differ_in_memory(square(GMMA::Layout_K_SW128_Atom<Half>{}), false, 64, 1, 1024, 16, 32));
  say("MN-major, 128, 64 wide",
      differ_in_memory(square(GMMA::Layout_MN_SW128_Atom<Half>{}), true, 64, 1, 1024, 8192, 2048));
  const auto wide = tile_to_shape(GMMA::Layout_MN_SW128_Atom<Half>{}, Shape<_128, _64>{}, Step<_2, _1>{});
  say("MN-major, 128, 128 wide", differ_in_memory(wide, true, 128, 1, 1024, 8192, 2048));
  // Narrower patterns repeat along k every 32 or 16 ks, all mns before the next.
  say("K-major, 32", differ_in_memory(square(GMMA::Layout_K_SW32_Atom<Half>{}), false, 64, 3, 256, 16, 64 * 32));
  say("K-major, none", differ_in_memory(square(GMMA::Layout_K_INTER_Atom<Half>{}), false, 64, 0, 128, 1024, 2048));
  return 0;
}
