// From raw products to scores: scale, soft cap, bias, mask. Tiles are [BLOCK_N][BLOCK_M].
#pragma once

#include <cmath>

#include "dropout.h"
#include "scratch.h"

namespace fastattn::FASTATTN_ISA {

constexpr int64_t TILE = BLOCK_N * BLOCK_M;

// Tiles hold raw products, -inf where hidden, and the softmax scales them: so where nothing but a scale that leaves
// differences in range lies between a product and its score. Elsewhere they hold scores.
INLINE bool holds_products(const Params& p) {
  return !p.bias.data && p.softcap == 0.0f && p.scale > 1e-30f && p.scale < 1e30f;
}

// What a tile's number is multiplied by to be a score.
INLINE float to_score(const Params& p) { return holds_products(p) ? p.scale : 1.0f; }

// One tile of keys as one tile of queries meets it.
struct TilePair {
  int64_t first;  // key
  int low, high;  // keys of the tile from low on and below high are worth a look; multiples of KEY_STEP
  bool check;     // some pair is hidden
  bool plain;     // products are what the tile holds: there is nothing to finish
  alignas(64) uint64_t bits[BLOCK_M];
  float *bias, *dropout;  // [BLOCK_N][BLOCK_M]
  float* bias_rows;       // [BLOCK_M][BLOCK_N]

  static size_t bytes() { return 3 * Scratch::bytes_for<float>(TILE); }
  void take(Scratch& from) {
    bias = from.take<float>(TILE);
    dropout = from.take<float>(TILE);
    bias_rows = from.take<float>(TILE);
  }

  // False: they see nothing of each other.
  bool classify(const Params& p, const QueryTile& tile, int64_t kv_tile) {
    first = kv_tile * BLOCK_N;
    TileClass found = tile.tile_class(kv_tile);
    uint64_t some = ~uint64_t{0};
    if (found == kCheck) found = tile.see(kv_tile, bits, &some);
    if (found == kSkip) return false;
    low = __builtin_ctzll(some) / KEY_STEP * KEY_STEP;
    high = BLOCK_N - __builtin_clzll(some) / KEY_STEP * KEY_STEP;
    check = found != kFull;
    plain = !check && holds_products(p);
    return true;
  }

  void look_at_all() {
    low = 0;
    high = BLOCK_N;
  }

  // A bit for each key that some query sees, by mask or by bias.
  uint64_t seen(const float* scores, int vectors) const {
    uint64_t found = 0;
    for (int j = low; j < high; ++j) {
      vi visible = vi{};
      for (int n = 0; n < vectors * VL; n += VL) visible |= load(scores + j * BLOCK_M + n) != splat(-kInfinity);
      found |= static_cast<uint64_t>(any(visible)) << j;
    }
    return found;
  }
};

// The bias of every pair of the tile; 0 past the last key. Rows lie far apart, so each one's next keys are fetched now.
static void read_bias(const Params& p, const QueryTile& tile, const TilePair& at) {
  const int64_t left = p.kv_len - at.first, keys = left < BLOCK_N ? left : BLOCK_N, lanes = tile.vectors * VL;
  const int64_t size = p.bias.dtype == kFloat32 ? 4 : 2, offset = at.first * p.bias.stride[3] * size;
  const int64_t next = p.bias.stride[3] == 1 && left > BLOCK_N ? BLOCK_N * size : 0;
  const char* first_row = row_at(p.bias, tile.b, tile.head[0], tile.q_idx[0]);
  read_row(p.bias, first_row + offset, keys, BLOCK_N, at.bias_rows);
  const char* row[BLOCK_M];
  bool shared = true;
  for (int lane = 0; lane < lanes; ++lane) {
    row[lane] = row_at(p.bias, tile.b, tile.head[lane], tile.q_idx[lane]);
    shared &= row[lane] == first_row;
  }
  if (!shared) {
    for (int lane = 0; lane < lanes; ++lane) fetch(row[lane] + offset + next, next);
    for (int lane = 1; lane < lanes; ++lane)
      read_row(p.bias, row[lane] + offset, keys, BLOCK_N, at.bias_rows + lane * BLOCK_N);
    transpose(at.bias_rows, BLOCK_N, lanes, BLOCK_N, at.bias, BLOCK_M);
    return;
  }
  for (int j = 0; j < BLOCK_N; ++j)
    for (int n = 0; n < lanes; n += VL) store(at.bias + j * BLOCK_M + n, splat(at.bias_rows[j]));
}

// All ones in the lanes that see key j of the tile.
INLINE vi visible_lanes(const TilePair& at, int j, int n) {
  vi word;
  for (int lane = 0; lane < VL; ++lane) word[lane] = static_cast<int32_t>(at.bits[n + lane] >> (j & 32));
  return word;
}

// From products to what tiles hold, in place, hidden pairs -inf. `slope`, where given, gets the soft cap's derivative,
// d score / d (scale * product), 0 where hidden: what nobody sees may hold anything.
static void finish_scores(const Params& p, const QueryTile& tile, const TilePair& at, float* s, float* slope) {
  const bool has_bias = p.bias.data != nullptr;
  if (has_bias) read_bias(p, tile, at);
  const vf scale = splat(holds_products(p) ? 1.0f : p.scale);
  const vf cap = splat(p.softcap), over_cap = splat(p.softcap ? 1.0f / p.softcap : 0.0f);
  for (int n = 0; n < tile.vectors * VL; n += VL) {
    vi word = vi{};
    for (int j = at.low; j < at.high; ++j) {
      float* pair = s + j * BLOCK_M + n;
      vf t = load(pair) * scale, bent = vf{};
      if (p.softcap != 0.0f) {
        bent = hyperbolic_tangent(t * over_cap);
        t = cap * bent;
      }
      vi hidden = vi{};
      if (has_bias) {
        const vf bias = load(at.bias + j * BLOCK_M + n);
        t = t + bias;
        hidden = bias == splat(-kInfinity);
      }
      if (at.check) {
        if (j % 32 == 0 || j == at.low) word = visible_lanes(at, j, n);
        hidden |= ~(word << (31 - j % 32) >> 31);
      }
      store(pair, hidden ? splat(-kInfinity) : t);
      if (slope) store(slope + j * BLOCK_M + n, hidden ? vf{} : 1.0f - bent * bent);
    }
  }
}

// Products -> scores, rounded.
INLINE void round_scores(const Params& p, const TilePair& at, float* s) {
  const vf unit = splat(to_score(p));
  for (int pair = at.low * BLOCK_M; pair < at.high * BLOCK_M; pair += VL)
    store(s + pair, rounded(load(s + pair) * unit));
}

// What the sink leaves of the weights of a row: exp(lse) / (exp(lse) + exp(sink)); `low` is what rounding took from
// lse.
INLINE float left_by_sink(float sink, float lse, float low) { return 1.0f / (1.0f + expf(sink - lse - low)); }

INLINE void multiply(const TilePair& pair, float* to, const float* factor) {
  for (int at = pair.low * BLOCK_M; at < pair.high * BLOCK_M; at += VL)
    store(to + at, load(to + at) * load(factor + at));
}

// Rows of keys without a bit in `seen`, zeroed in `pairs` form: their numbers may be anything.
template <class Dot>
static void clear_unseen(uint64_t seen, int64_t width, typename Dot::Word* pairs) {
  const PairsOf<Dot> form(width);
  for (int j = 0; j < BLOCK_N; ++j) {
    if (seen >> j & 1) continue;
    typename Dot::Word* word = pairs + j / Dot::PER_WORD * form.step;
    for (int64_t d = 0; d < width; ++d, word += form.row) {
      if constexpr (Dot::PER_WORD == 1)
        *word = 0;
      else
        *word &= j % 2 ? 0x0000ffffu : 0xffff0000u;
    }
  }
}

}  // namespace fastattn::FASTATTN_ISA
