// The CUDA backend's entry point: one problem, launched on a stream. Neither torch nor CUDA.
#pragma once

#include "../common/params.h"
#include "tiles.h"

namespace fastattn::cuda {

// Lists of key tiles for each tile of queries: the checked ones first. Strides of batch and heads are 0 where one
// serves all.
struct Lists {
  const int32_t *counts, *tiles;  // counts: checked, then, `to_full` further, full
  int64_t count_stride[2], to_full, tile_stride[2], row;
};

// A forward problem, and what the host has decided about it.
struct Request {
  Params problem;
  KernelVariant variant = kPlain;
  bool hides = false;  // a key may be hidden from every query, and its values then be anything
  Lists lists{};       // of the tiles that `plan` names; counts null: intervals are walked
  int32_t splits = 1;
  int32_t* taken = nullptr;  // 0 before the launch; null where `plan` does not ask for it
  // Where there are splits: [splits, batch, num_heads, q_len(, part_step of `plan`)].
  float *parts = nullptr, *part_lse = nullptr;
  void* stream = nullptr;
  int32_t device = 0;
};

// Null, or why it was not launched, in words that last until the thread's next call.
const char* forward(const Request& request);

// The multiprocessors of a device; 0 where it is none.
int32_t multiprocessors(int32_t device);

}  // namespace fastattn::cuda
