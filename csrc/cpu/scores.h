// From raw products to scores: scale, soft cap, bias, mask; and the dropout factors. Tiles are [BLOCK_N][BLOCK_M].
#pragma once

#include "../common/philox.h"
#include "query_tile.h"

namespace fastattn::FASTATTN_ISA {

constexpr int64_t TILE = BLOCK_N * BLOCK_M;

struct ScoreScratch {
  float* bias;     // [BLOCK_N][BLOCK_M]
  float* dropout;  // [BLOCK_N][BLOCK_M]
  uint8_t* mask;   // a tile for each leaf

  static size_t bytes(const Params& p) {
    return 2 * Scratch::bytes_for<float>(TILE) + Scratch::bytes_for<uint8_t>(TILE * (p.mask.leaves + 1));
  }
  void take(const Params& p, Scratch& from) {
    bias = from.take<float>(TILE);
    dropout = from.take<float>(TILE);
    mask = from.take<uint8_t>(TILE * (p.mask.leaves + 1));
  }
};

// The bias of every pair of the tile, hidden keys' too where they exist; 0 past the last key.
static void read_bias(const Params& p, const QueryTile& tile, int64_t first, float* to) {
  const int64_t left = p.kv_len - first, keys = left < BLOCK_N ? left : BLOCK_N;
  float row[BLOCK_N];
  const bool shared = p.bias.stride[2] == 0 && (p.bias.stride[1] == 0 || tile.head[0] == tile.head[tile.count - 1]);
  for (int lane = 0; lane < BLOCK_M; ++lane) {
    if (lane == 0 || !shared) {
      const char* at = row_at(p.bias, tile.b, tile.head[lane], tile.q_idx[lane]);
      read_row(p.bias, at + first * p.bias.stride[3] * (p.bias.dtype == kFloat32 ? 4 : 2), keys, BLOCK_N, row);
    }
    for (int j = 0; j < BLOCK_N; ++j) to[j * BLOCK_M + lane] = row[j];
  }
}

// Scores in place, hidden pairs -inf. `slope`, where given, gets d score / d (scale * product), the soft cap's.
static void finish_scores(const Params& p, const QueryTile& tile, int64_t first, bool check, const ScoreScratch& work,
                          float* s, float* slope) {
  const bool has_bias = p.bias.data != nullptr;
  const uint8_t* seen = nullptr;
  if (has_bias) read_bias(p, tile, first, work.bias);
  if (check && !p.mask.is_intervals()) seen = evaluate_mask(p, tile, first, work.mask);
  const vf scale = splat(p.scale), cap = splat(p.softcap), over_cap = splat(p.softcap ? 1.0f / p.softcap : 0.0f);
  for (int j = 0; j < BLOCK_N; ++j) {
    const vi kv_idx = splat_int(static_cast<int32_t>(first + j));
    for (int n = 0; n < BLOCK_M; n += VL) {
      float* at = s + j * BLOCK_M + n;
      vf t = load(at) * scale;
      if (p.softcap != 0.0f) {
        const vf bent = hyperbolic_tangent(t * over_cap);
        t = cap * bent;
        if (slope) store(slope + j * BLOCK_M + n, 1.0f - bent * bent);
      }
      vi hidden = vi{};
      if (has_bias) {
        const vf bias = load(work.bias + j * BLOCK_M + n);
        t = t + bias;
        hidden = bias == splat(-kInfinity);
      }
      if (seen) {
        for (int lane = 0; lane < VL; ++lane) hidden[lane] |= seen[j * BLOCK_M + n + lane] ? 0 : -1;
      } else if (check) {
        vi kept = (kv_idx >= load<vi>(tile.start[0] + n)) & (kv_idx < load<vi>(tile.stop[0] + n));
        if (tile.spans == 2) kept |= (kv_idx >= load<vi>(tile.start[1] + n)) & (kv_idx < load<vi>(tile.stop[1] + n));
        hidden |= ~kept;
      }
      store(at, hidden ? splat(-kInfinity) : t);
    }
  }
}

// What a weight is multiplied by: 0 where it is dropped, else 1 / (1 - p).
static void dropout_factors(const Params& p, const QueryTile& tile, int64_t first, float* factor) {
  for (int j = 0; j < BLOCK_N; j += 4) {
    uint32_t words[4][BLOCK_M];
    for (int lane = 0; lane < BLOCK_M; ++lane) {
      words[0][lane] = static_cast<uint32_t>((first + j) / 4);
      words[1][lane] = static_cast<uint32_t>(tile.q_idx[lane]);
      words[2][lane] = static_cast<uint32_t>(tile.head[lane]);
      words[3][lane] = static_cast<uint32_t>(tile.b);
    }
    philox<BLOCK_M>(p.seed, words);
    for (int word = 0; word < 4; ++word)
      for (int lane = 0; lane < BLOCK_M; ++lane)
        factor[(j + word) * BLOCK_M + lane] = words[word][lane] >= p.drop_below ? p.keep_scale : 0.0f;
  }
}

// Rows of keys that no query of the tile sees, zeroed in `pairs` form: their numbers may be anything.
template <class Dot>
static void clear_unseen(const float* scores, int64_t width, typename Dot::Word* pairs) {
  for (int j = 0; j < BLOCK_N; ++j) {
    vi seen = vi{};
    for (int n = 0; n < BLOCK_M; n += VL) seen |= load(scores + j * BLOCK_M + n) != splat(-kInfinity);
    if (any(seen)) continue;
    typename Dot::Word* row = pairs + j / Dot::PER_WORD * width;
    for (int64_t d = 0; d < width; ++d) {
      if constexpr (Dot::PER_WORD == 1)
        row[d] = 0;
      else
        row[d] &= j % 2 ? 0x0000ffffu : 0xffff0000u;
    }
  }
}

}  // namespace fastattn::FASTATTN_ISA
