// What a forward kernel is launched with. The host fills it in (dispatch.cu); kernels only read it.
#pragma once

#include "arch/arch.h"
#include "request.h"

namespace fastattn::cuda {

constexpr int kMostProgramTerms = 8;
constexpr int kMostProgramWords = 16;

// An int of each batch item, of 32 or 64 bits, `step` bytes apart. data null: none.
struct Numbers {
  const char* data;
  int32_t step;
  bool wide;
};

// An interval of keys for each query: from tables, or, where they are null, [query + low, query + high), moved and cut
// by what the columns say of the batch item (common/params.h, MaskTerm).
struct Interval {
  const int32_t *start, *stop;  // inside [0, kv_len]
  int64_t stride[3];            // of batch, heads, queries
  int32_t low, high;
  Numbers column[3];  // offset, first, end
};

// What the mask shows of one pair, where lists of tiles are walked: terms joined in postfix (common/params.h).
struct Program {
  int32_t words, word[kMostProgramWords];
  MaskTerm term[kMostProgramTerms];
};

// Keys and values in blocks of a pool (common/params.h, Table). A copy moves `run` keys, which divides a block and a
// tile.
struct Pages {
  const int32_t* table;  // or null: a tile is one box of the tensor
  int64_t stride;        // of batch
  int32_t block_size, block_count, run;
};

struct ForwardArgs {
  arch::TensorMap query;  // (head_dim, q_len, group, num_kv_heads, batch), in boxes of 64 columns and a tile's rows
  // (head_dim, kv_len, num_kv_heads, batch), in boxes of 64 columns and BLOCK_N rows; of pools (head_dim, block_size,
  // num_kv_heads, blocks), in boxes of `run` rows
  arch::TensorMap key;
  arch::TensorMap value;
  int32_t query_step;                  // 0 where all of a batch are the same: the coordinate stays 0
  int32_t key_step[2], value_step[2];  // the same of batch or blocks, heads
  Pages pages;

  int32_t batch, num_heads, num_kv_heads, group, q_len, kv_len, head_dim_v;
  int32_t tile_heads;  // query heads of one key head that share a tile, tile_rows queries each
  int32_t tile_rows;
  int32_t q_tiles;     // tiles of queries of one head
  int32_t unit_heads;  // of heads that share tiles, units, in one key head
  int32_t l2_group;    // units whose keys and values stay in the L2 cache together
  int32_t splits;      // programs that share one tile's keys
  int32_t programs;    // tiles to compute, over all units and splits
  int32_t blocks;      // of the launch
  int32_t* taken;      // how many have been taken beyond each block's first; null: none, or in turn

  float factor;          // turns scores into powers of two; includes the scale where scores are raw products
  float lowest;          // no score below it is seen: times the factor it is finite
  float scale, softcap;  // kGeneral, whose scores are natural
  bool hides;            // keys may be hidden from every query, and their values then be anything

  int32_t terms;  // intervals of each query
  Interval interval[2];
  bool listed;
  Lists lists;
  Program program;

  Table bias;
  const float* sinks;
  uint32_t drop_below;
  bool drops, drops_all;
  float keep_scale;
  const int64_t* seed;

  void* out;              // or null: a split's parts go to `parts`
  int64_t out_stride[3];  // of batch, heads, queries; columns lie side by side
  bool out_aligned;       // to 16 bytes, rows too
  float* parts;           // [splits, batch, num_heads, q_len, part_step]
  int32_t part_step;      // of dispatch.h, Plan
  float* lse;             // [batch, num_heads, q_len], or the parts' with splits in front
};

// Parts of one problem over disjoint keys, put together.
struct MergeArgs {
  const float *parts, *part_lse, *sinks;
  void* out;
  int64_t out_stride[3];
  float* lse;
  int64_t rows;  // batch * num_heads * q_len
  int32_t splits, num_heads, q_len, head_dim_v, part_step;
};

}  // namespace fastattn::cuda
