// Which block computes which tile of queries, and in which order: what walk.h says of a problem's programs.
#include "../../../csrc/cuda/walk.h"

namespace fastattn::cuda {
namespace {

constexpr int BLOCK_M = 128;

// rows [programs, 6]: block, round, batch, head, q_first, split.
__global__ void order_kernel(const ForwardArgs a, int32_t* rows) {
  if (threadIdx.x != 0) return;
  int32_t program = blockIdx.x;
  for (int32_t round = 0; program < a.programs; ++round) {
    const Place place = place_of<BLOCK_M>(a, program);
    const int32_t row[6] = {
        static_cast<int32_t>(blockIdx.x), round, place.batch, place.head, place.q_first, place.split};
    for (int n = 0; n < 6; ++n) rows[6 * program + n] = row[n];
    program = next_program<kPlain>(a, program, round);
  }
}

}  // namespace
}  // namespace fastattn::cuda

extern "C" __attribute__((visibility("default"))) const char* order(int32_t blocks, int32_t batch, int32_t num_kv_heads,
                                                                    int32_t group, int32_t q_tiles, int32_t splits,
                                                                    int32_t l2_group, int32_t* rows) {
  using namespace fastattn::cuda;
  ForwardArgs a{};
  a.batch = batch;
  a.num_kv_heads = num_kv_heads;
  a.group = a.unit_heads = group;
  a.tile_heads = 1;
  a.tile_rows = BLOCK_M;
  a.q_tiles = q_tiles;
  a.splits = splits;
  a.l2_group = l2_group;
  a.programs = batch * num_kv_heads * group * q_tiles * splits;
  a.blocks = blocks;
  fastattn::arch::Launch how;
  how.grid = dim3(blocks);
  how.threads = 32;
  return fastattn::arch::launch(order_kernel, how, a, rows);
}
