// The weights themselves, from lse: one tile of pairs after another, written as they are or added up over the heads.
#pragma once

#include <cmath>

#include "tiles.h"
#include "work.h"

namespace fastattn::FASTATTN_ISA {

template <class Dot>
struct WeightsWork {
  KeyTile<Dot> keys;
  TilePair at;
  QueryTile* tile;
  QueryRows<Dot> rows;
  float* s;  // [BLOCK_N][BLOCK_M]

  bool take(const Params& p, Scratch& from) {
    if (!from.reset(KeyTile<Dot>::bytes(p) + TilePair::bytes() + Scratch::bytes_for<QueryTile>(1) +
                    QueryRows<Dot>::bytes(p.head_dim, false) + Scratch::bytes_for<float>(TILE)))
      return false;
    keys.take(p, from);
    at.take(from);
    tile = from.take<QueryTile>(1);
    rows.take(p.head_dim, false, from);
    s = from.take<float>(TILE);
    return true;
  }
};

// [BLOCK_N][BLOCK_M] weights, times a factor, to the rows from `first_row` on; `s` null: zeros.
static void write_weights(const Params& p, const QueryTile& tile, int64_t first_row, int64_t first, float factor,
                          bool add, const float* s) {
  const int64_t left = p.kv_len - first, keys = left < BLOCK_N ? left : BLOCK_N, step = p.weights.stride[3];
  alignas(64) float rows[TILE];
  if (s)
    transpose(s, BLOCK_M, BLOCK_N, BLOCK_M, rows, BLOCK_N);
  else
    std::memset(rows, 0, sizeof rows);
  for (int lane = 0; lane < tile.count; ++lane) {
    const int64_t h = p.mean_heads ? 0 : tile.head[lane];
    float* to = reinterpret_cast<float*>(const_cast<char*>(row_at(p.weights, tile.b, h, first_row + lane)));
    to += first * step;
    const float* row = rows + lane * BLOCK_N;
    if (add)
      for (int64_t j = 0; j < keys; ++j) to[j * step] += row[j] * factor;
    else
      for (int64_t j = 0; j < keys; ++j) to[j * step] = row[j] * factor;
  }
}

// exp(score - lse), both rounded as finish_row rounds them, of a tile of pairs, [BLOCK_N][BLOCK_M] in work.s; false
// where they see nothing of each other.
template <class Dot>
static bool weigh(const Params& p, int64_t kv_head, int64_t kv_tile, const float* lse, WeightsWork<Dot>& work) {
  const QueryTile& tile = *work.tile;
  if (!work.at.classify(p, tile, kv_tile)) return false;
  work.at.look_at_all();
  work.keys.read_keys(p, tile.b, kv_head, kv_tile);
  lane_product<Dot, false>(tile.vectors, BLOCK_N, steps_of<Dot>(p.head_dim), along<Dot>(work.keys.k),
                           words_of<Dot>(padded(p.head_dim)), 1, work.rows.across, work.s);
  if (!work.at.plain) finish_scores(p, tile, work.at, work.s, nullptr);
  round_scores(p, work.at, work.s);
  for (int n = 0; n < tile.vectors * VL; n += VL)
    for (int at = n; at < TILE; at += BLOCK_M) {
      const vf power = (load(work.s + at) - load(lse + n)) * kLog2E;
      store(work.s + at, exp2(at_most_zero(power)));
    }
  return true;
}

// Beside a larger lse, what rounding takes from it is seen in the weights, and they are summed once more.
constexpr float kSmallLse = 1024.0f;

template <class Dot>
static void weights_of_head(const Params& p, int64_t b, int64_t h, int64_t first_row, int64_t rows, bool add,
                            WeightsWork<Dot>& work) {
  QueryTile& tile = *work.tile;
  tile.pick(p, b, h, p.rows, first_row, rows);
  work.rows.read(p.query, tile, p.head_dim, nullptr);
  alignas(64) float lse[BLOCK_M], share[BLOCK_M];
  bool large = false;
  for (int lane = 0; lane < BLOCK_M; ++lane) {
    const float given = p.lse[(b * p.num_heads + h) * p.q_len + tile.q_idx[lane]];
    const bool none = given == -kInfinity;
    lse[lane] = none ? kInfinity : given == kInfinity ? NAN : given;
    share[lane] = p.sinks && !none ? left_by_sink(p.sinks[h], given, 0.0f) : 1.0f;
    large |= !none && !(fabsf(given) < kSmallLse);
  }
  const float factor = p.mean_heads ? 1.0f / static_cast<float>(p.num_heads) : 1.0f;
  const int64_t kv_tiles = (p.kv_len + BLOCK_N - 1) / BLOCK_N, lanes = tile.vectors * VL;
  if (large) {
    alignas(64) float sum[BLOCK_M] = {};
    for (int64_t kv_tile = 0; kv_tile < kv_tiles; ++kv_tile) {
      if (!weigh(p, h / p.group, kv_tile, lse, work)) continue;
      for (int n = 0; n < lanes; n += VL)
        for (int at = n; at < TILE; at += BLOCK_M) store(sum + n, load(sum + n) + load(work.s + at));
    }
    for (int lane = 0; lane < lanes; ++lane)
      if (!(fabsf(lse[lane]) < kSmallLse) && sum[lane] > 0.0f) share[lane] /= sum[lane];
  }
  for (int64_t kv_tile = 0; kv_tile < kv_tiles; ++kv_tile) {
    if (!weigh(p, h / p.group, kv_tile, lse, work)) {
      if (!add) write_weights(p, tile, first_row, kv_tile * BLOCK_N, factor, false, nullptr);
      continue;
    }
    for (int n = 0; n < lanes; n += VL)
      for (int at = n; at < TILE; at += BLOCK_M) store(work.s + at, load(work.s + at) * load(share + n));
    write_weights(p, tile, first_row, work.at.first, factor, add, work.s);
  }
}

template <class Dot>
static const char* run_weights(const Params& p) {
  const int64_t rows = p.row_count < 0 ? p.q_len : p.row_count, tiles = (rows + BLOCK_M - 1) / BLOCK_M;
  const int64_t heads = p.mean_heads ? 1 : p.num_heads;
  const bool done = run_items(p, p.batch * heads * tiles, [&](int64_t item, Scratch& scratch) {
    WeightsWork<Dot> work;
    if (!work.take(p, scratch)) return false;
    const int64_t b = item / tiles / heads, first_row = item % tiles * BLOCK_M;
    if (!p.mean_heads) {
      weights_of_head<Dot>(p, b, item / tiles % heads, first_row, rows, false, work);
    } else {
      for (int64_t h = 0; h < p.num_heads; ++h) weights_of_head<Dot>(p, b, h, first_row, rows, h > 0, work);
    }
    return true;
  });
  return done ? nullptr : NO_MEMORY;
}

}  // namespace fastattn::FASTATTN_ISA
