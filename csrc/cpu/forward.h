// Forward, by tiles of queries (Dao et al. 2022, FlashAttention): scores S^T = K Q^T [keys][queries], so that queries are
// lanes and maximum, sum and mask need no step across them; weights P^T = exp(S^T - max); output O^T += V^T P^T.
//
// An item of work is a few tiles of queries that share each packed tile of keys, and, where there are few queries, a part
// of the keys, whose results are joined afterwards. Which parts depends on the shape alone: so do the bits.
#pragma once

#include <cmath>

#include "tiles.h"

namespace fastattn::FASTATTN_ISA {

constexpr int64_t MOST_TILES = 8;      // tiles of queries an item
constexpr int64_t ENOUGH_TILES = 16;   // of queries, below which keys are split
constexpr int64_t LEAST_KEY_TILES = 8;  // a part of the keys

struct ForwardPlan {
  int64_t units, tiles, per_item, blocks, parts, part_tiles;
  float* partial;

  explicit ForwardPlan(const Params& p) {
    units = Unit::count(p);
    tiles = (Unit::rows(p) + BLOCK_M - 1) / BLOCK_M;
    const int64_t kv_tiles = (p.kv_len + BLOCK_N - 1) / BLOCK_N, all = units * tiles;
    parts = all && all < ENOUGH_TILES ? kv_tiles / LEAST_KEY_TILES : 1;
    const int64_t most = all ? 2 * ENOUGH_TILES / all : 1;
    parts = parts > most ? most : parts;
    parts = parts < 1 ? 1 : parts;
    part_tiles = (kv_tiles + parts - 1) / parts;
    per_item = all / (4 * (p.threads > 1 ? p.threads : 1));
    per_item = per_item < 1 || parts > 1 ? 1 : per_item > MOST_TILES ? MOST_TILES : per_item;
    blocks = (tiles + per_item - 1) / per_item;
    partial = nullptr;
  }
  int64_t items() const { return units * blocks * parts; }
  // Floats of one tile's running result: maximum, sum, output.
  static int64_t state_size(const Params& p) { return BLOCK_M * (2 + padded(p.head_dim_v)); }
};

// The running result of a tile of queries.
struct State {
  float *max, *sum, *out;  // [BLOCK_M], [BLOCK_M], [width][BLOCK_M]

  State(float* at) : max(at), sum(at + BLOCK_M), out(at + 2 * BLOCK_M) {}
  void clear(int64_t width) {
    for (int lane = 0; lane < BLOCK_M; ++lane) max[lane] = -kInfinity;
    std::memset(sum, 0, (1 + width) * BLOCK_M * sizeof(float));
  }
  void scale(int n, vf factor, int64_t width) {
    store(sum + n, load(sum + n) * factor);
    for (int64_t d = 0; d < width; ++d) store(out + d * BLOCK_M + n, load(out + d * BLOCK_M + n) * factor);
  }
  // Raise the maximum of the lanes from n on; returns what to subtract from scores.
  vf raise(int n, vf found, int64_t width) {
    const vf before = load(max + n), now = larger(before, found);
    const vf shift = now == splat(-kInfinity) ? vf{} : now;
    if (any(now != before)) {
      store(max + n, now);
      if (any(before != splat(-kInfinity))) scale(n, exponential(before - shift), width);
    }
    return shift;
  }
};

// Scores times `factor` -> weights in place, with the running maximum and sum.
static void soften(float* s, float factor, State& state, int64_t width) {
  for (int n = 0; n < BLOCK_M; n += VL) {
    vf found = splat(-kInfinity);
    for (int j = 0; j < BLOCK_N; ++j) found = larger(found, load(s + j * BLOCK_M + n));
    const vf shift = state.raise(n, found * factor, width);
    vf sum = load(state.sum + n);
    for (int j = 0; j < BLOCK_N; ++j) {
      const vf weight = exponential(load(s + j * BLOCK_M + n) * factor - shift);
      sum = sum + weight;
      store(s + j * BLOCK_M + n, weight);
    }
    store(state.sum + n, sum);
  }
}

// out and lse of a finished tile.
static void finish_tile(const Params& p, const QueryTile& tile, const State& state) {
  float factor[BLOCK_M];
  for (int lane = 0; lane < tile.count; ++lane) {
    const float sum = state.sum[lane], max = state.max[lane];
    const bool none = max == -kInfinity && sum == 0.0f;
    const float lse = none ? -kInfinity : max + logf(sum);
    const int64_t h = tile.head[lane];
    factor[lane] = none ? 0.0f : 1.0f / sum;
    if (p.sinks) factor[lane] *= 1.0f / (1.0f + expf(p.sinks[h] - lse));
    p.lse[(tile.b * p.num_heads + h) * p.q_len + tile.q_idx[lane]] = lse;
  }
  write_lanes(p.out, tile, p.head_dim_v, state.out, factor);
}

template <class Dot>
struct ForwardWork {
  using Word = typename Dot::Word;
  KeyTile<Dot> keys;
  ScoreScratch scores;
  QueryRows<Dot> rows[MOST_TILES];
  float *s, *states;
  Word* words;

  bool take(const Params& p, const ForwardPlan& plan, Scratch& from) {
    const size_t bytes = KeyTile<Dot>::bytes(p) + ScoreScratch::bytes(p) + 2 * Scratch::bytes_for<float>(TILE) +
                         plan.per_item * (QueryRows<Dot>::bytes(p.head_dim) +
                                          Scratch::bytes_for<float>(ForwardPlan::state_size(p)));
    if (!from.reset(bytes)) return false;
    keys.take(p, from);
    scores.take(p, from);
    s = from.take<float>(TILE);
    words = from.take<Word>(TILE);
    states = from.take<float>(plan.per_item * ForwardPlan::state_size(p));
    for (int64_t n = 0; n < plan.per_item; ++n) rows[n].take(p.head_dim, from);
    return true;
  }
};

// One tile of keys for one tile of queries.
template <class Dot>
static void forward_step(const Params& p, const QueryTile& tile, const QueryRows<Dot>& query, int64_t kv_tile,
                         bool check, ForwardWork<Dot>& work, State& state) {
  const int64_t width = padded(p.head_dim_v), steps = steps_of<Dot>(p.head_dim);
  lane_product<Dot, false>(BLOCK_N, steps, work.keys.k_along, steps, 1, query.across, work.s);
  const bool plain = !check && !p.bias.data && p.softcap == 0.0f && p.scale >= 0.0f;
  if (!plain) finish_scores(p, tile, kv_tile * BLOCK_N, check, work.scores, work.s, nullptr);
  const auto* values = work.keys.seen(work.s, work.keys.v_pairs, width);
  soften(work.s, plain ? p.scale : 1.0f, state, width);
  if (p.drop_below) {
    dropout_factors(p, tile, kv_tile * BLOCK_N, work.scores.dropout);
    for (int64_t at = 0; at < TILE; at += VL)
      store(work.s + at, load(work.s + at) * load(work.scores.dropout + at));
  }
  const auto* weights = weight_pairs<Dot>(work.s, work.words);
  lane_product<Dot, true>(width, BLOCK_N / Dot::PER_WORD, values, 1, width, weights, state.out);
}

template <class Dot>
static void forward_item(const Params& p, const ForwardPlan& plan, int64_t item, Scratch& scratch) {
  static thread_local QueryTile tiles[MOST_TILES];
  ForwardWork<Dot> work;
  if (!work.take(p, plan, scratch)) return;
  const int64_t size = ForwardPlan::state_size(p), width = padded(p.head_dim_v);
  const int64_t part = item % plan.parts, block = plan.blocks - 1 - item / plan.parts % plan.blocks;
  const int64_t index = item / plan.parts / plan.blocks, first_tile = block * plan.per_item;
  const int64_t left = plan.tiles - first_tile, count = left < plan.per_item ? left : plan.per_item;
  const Unit unit(p, index);
  int64_t first = INT64_MAX, last = 0;
  for (int64_t n = 0; n < count; ++n) {
    tiles[n].place(p, unit, (first_tile + n) * BLOCK_M);
    work.rows[n].read(p.query, tiles[n], p.head_dim, false, nullptr);
    State(work.states + n * size).clear(width);
    int64_t from, to;
    tiles[n].tiles(&from, &to);
    first = from < first ? from : first;
    last = to > last ? to : last;
  }
  const int64_t part_first = part * plan.part_tiles, part_last = part_first + plan.part_tiles;
  first = first < part_first ? part_first : first;
  last = last > part_last ? part_last : last;
  for (int64_t kv_tile = first; kv_tile < last; ++kv_tile) {
    bool packed = false;
    for (int64_t n = 0; n < count; ++n) {
      const TileClass found = tiles[n].tile_class(kv_tile);
      if (found == kSkip) continue;
      if (!packed) work.keys.read_forward(p, unit.b, unit.kv_head, kv_tile);
      packed = true;
      State state(work.states + n * size);
      forward_step<Dot>(p, tiles[n], work.rows[n], kv_tile, found != kFull, work, state);
    }
  }
  for (int64_t n = 0; n < count; ++n) {
    if (plan.parts == 1)
      finish_tile(p, tiles[n], State(work.states + n * size));
    else
      std::memcpy(plan.partial + ((index * plan.tiles + first_tile + n) * plan.parts + part) * size,
                  work.states + n * size, size * sizeof(float));
  }
}

// Join the parts of one tile of queries, in order.
static void join_parts(const Params& p, const ForwardPlan& plan, int64_t item) {
  const int64_t size = ForwardPlan::state_size(p), width = padded(p.head_dim_v);
  QueryTile tile;
  tile.place(p, Unit(p, item / plan.tiles), item % plan.tiles * BLOCK_M);
  float* parts = plan.partial + item * plan.parts * size;
  State whole(parts);
  for (int64_t n = 1; n < plan.parts; ++n) {
    State part(parts + n * size);
    for (int lane = 0; lane < BLOCK_M; lane += VL) {
      const vf shift = whole.raise(lane, load(part.max + lane), width);
      const vf factor = exponential(load(part.max + lane) - shift);
      store(whole.sum + lane, load(whole.sum + lane) + load(part.sum + lane) * factor);
      for (int64_t d = 0; d < width; ++d) {
        float* to = whole.out + d * BLOCK_M + lane;
        store(to, load(to) + load(part.out + d * BLOCK_M + lane) * factor);
      }
    }
  }
  finish_tile(p, tile, whole);
}

}  // namespace fastattn::FASTATTN_ISA
