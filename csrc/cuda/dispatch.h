// What is behind the CUDA backend's entry point (request.h): how a problem is cut, and the launches that each
// translation unit makes.
#pragma once

#include "args.h"

namespace fastattn::cuda {

struct Plan {
  int32_t width;  // in kWidths
  TileSize tile;
  int32_t tile_heads, tile_rows;
  int32_t splits;
  int32_t part_step;  // columns from a row of a split's part to the next: head_dim_v in whole sectors, 8 floats each
  bool counts;        // tiles differ and are more than blocks: a counter hands them out, the heaviest first
};

// How a problem is cut. `by_head`: heads see different keys, so that none share a tile.
Plan plan(const Params& p, KernelVariant variant, bool by_head, int32_t multiprocessors);

template <class T, int WIDTH, int WIDTH_V>
const char* launch_forward(KernelVariant variant, const ForwardArgs& args, const arch::Launch& how);

}  // namespace fastattn::cuda
