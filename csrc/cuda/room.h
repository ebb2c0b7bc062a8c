// The CUDA room's door: one problem, launched on a stream. Torch-free.
#pragma once

#include "args.h"
#include "tiles.h"

namespace fastattn::cuda {

// A forward problem, and what the host has decided about it.
struct Request {
  Params problem;
  Kind kind = kPlain;
  bool hides = false;  // a key may be hidden from every query, and its values then be anything
  Lists lists{};       // of the tiles that `plan` names; counts null: intervals are walked
  int32_t splits = 1;
  float *parts = nullptr, *part_lse = nullptr;  // where there are splits: [splits, batch, num_heads, q_len(, head_dim_v)]
  void* stream = nullptr;
};

struct Plan {
  int32_t width;  // in kWidths
  TileSize tile;
  int32_t tile_heads, tile_rows;
  int32_t splits;
};

// How a problem is cut. `by_head`: heads see different keys, so that none share a tile.
Plan plan(const Params& p, Kind kind, bool by_head, int32_t multiprocessors);

// Null, or why it was not launched, in words that last until the thread's next call.
const char* forward(const Request& request);

// The multiprocessors of the current device; 0 where there is none.
int32_t multiprocessors();

template <class T, int WIDTH, int WIDTH_V>
const char* launch_forward(Kind kind, const ForwardArgs& args, const arch::Launch& how);

template <class T>
const char* launch_merge(const MergeArgs& args, void* stream);

}  // namespace fastattn::cuda
