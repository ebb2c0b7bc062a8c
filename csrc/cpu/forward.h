// Forward, by tiles of queries (Dao et al. 2022, FlashAttention): scores S^T = K Q^T [keys][queries], so that queries
// are lanes and maximum, sum and mask need no step across them; weights P^T = exp(S^T - max); output O^T += V^T P^T.
//
// An item of work is a few tiles of queries that share each packed tile of keys, and, where there are few queries, a
// part of the keys, whose results are joined afterwards. Which parts depends on the shape alone: so do the bits.
#pragma once

#include "decode.h"

namespace fastattn::FASTATTN_ISA {

constexpr int64_t MOST_TILES = 8;        // tiles of queries an item
constexpr int64_t ENOUGH_TILES = 64;     // of queries, below which keys are split
constexpr int64_t LEAST_KEY_TILES = 16;  // a part of the keys

struct ForwardPlan {
  int64_t units, tiles, per_item, blocks, parts, part_tiles;
  float* partial;

  explicit ForwardPlan(const Params& p) {
    units = Unit::count(p);
    tiles = Unit::tiles(p);
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
};

template <class Dot>
struct ForwardWork {
  using Word = typename Dot::Word;
  KeyTile<Dot> keys;
  TilePair at;
  QueryTile* tiles;
  QueryRows<Dot> rows[MOST_TILES];
  float *s, *states;
  Word* words;

  bool take(const Params& p, const ForwardPlan& plan, Scratch& from) {
    const size_t bytes =
        KeyTile<Dot>::bytes(p) + TilePair::bytes() + 2 * Scratch::bytes_for<float>(TILE) +
        Scratch::bytes_for<QueryTile>(plan.per_item) +
        plan.per_item * (QueryRows<Dot>::bytes(p.head_dim, false) + Scratch::bytes_for<float>(State::size(p)));
    if (!from.reset(bytes)) return false;
    keys.take(p, from);
    at.take(from);
    s = from.take<float>(TILE);
    words = from.take<Word>(TILE);
    tiles = from.take<QueryTile>(plan.per_item);
    states = from.take<float>(plan.per_item * State::size(p));
    for (int64_t n = 0; n < plan.per_item; ++n) rows[n].take(p.head_dim, false, from);
    return true;
  }
};

// One tile of keys for one tile of queries.
template <class Dot>
static void forward_step(const Params& p, const QueryTile& tile, const QueryRows<Dot>& query, ForwardWork<Dot>& work,
                         State& state) {
  const int64_t width = padded(p.head_dim_v), steps = steps_of<Dot>(p.head_dim);
  const TilePair& at = work.at;
  const int64_t row = words_of<Dot>(padded(p.head_dim));
  const int keys = at.high - at.low;
  float* s = work.s + at.low * BLOCK_M;
  lane_product<Dot, false>(tile.vectors, keys, steps, along<Dot>(work.keys.k) + at.low * row, row, 1, query.across, s);
  if (!at.plain) finish_scores(p, tile, at, work.s, nullptr);
  const auto* values = work.keys.clean(at, tile, work.s, width);
  online_softmax_step(tile.vectors, keys, s, to_power(p), state, width);
  if (p.drop_below) {
    dropout_factors(p, tile, at.first, at.low, at.high, at.dropout);
    multiply(at, work.s, at.dropout);
  }
  const auto* weights = weight_pairs<Dot>(tile.vectors, keys, s, work.words);
  const PairsOf<Dot> form(width);
  lane_product<Dot, true>(tile.vectors, width, keys / Dot::PER_WORD, values + words_of<Dot>(at.low) * form.step,
                          form.row, form.step, weights, state.out);
}

template <class Dot>
static bool forward_item(const Params& p, const ForwardPlan& plan, int64_t item, Scratch& scratch) {
  ForwardWork<Dot> work;
  if (!work.take(p, plan, scratch)) return false;
  const int64_t size = State::size(p), width = padded(p.head_dim_v);
  // Last queries first: under a causal mask they see most.
  const int64_t part = item % plan.parts, index = item / plan.parts % plan.units;
  const int64_t block = plan.blocks - 1 - item / plan.parts / plan.units, first_tile = block * plan.per_item;
  const int64_t left = plan.tiles - first_tile, count = left < plan.per_item ? left : plan.per_item;
  const Unit unit = Unit::at(p, index);
  int64_t first = INT64_MAX, last = 0;
  for (int64_t n = 0; n < count; ++n) {
    work.tiles[n].place(p, unit.b, unit.head, unit.heads, (first_tile + n) * BLOCK_M);
    work.rows[n].read(p.query, work.tiles[n], p.head_dim, nullptr);
    State(work.states + n * size).clear(width);
    int64_t from, to;
    work.tiles[n].tiles(&from, &to);
    if (from >= to) continue;
    first = from < first ? from : first;
    last = to > last ? to : last;
  }
  const int64_t part_first = part * plan.part_tiles, part_last = part_first + plan.part_tiles;
  first = first < part_first ? part_first : first;
  last = last > part_last ? part_last : last;
  for (int64_t kv_tile = first; kv_tile < last; ++kv_tile) {
    bool packed = false;
    for (int64_t n = 0; n < count; ++n) {
      if (!work.at.classify(p, work.tiles[n], kv_tile)) continue;
      if (!packed) work.keys.read_forward(p, unit.b, unit.kv_head, kv_tile);
      packed = true;
      State state(work.states + n * size);
      forward_step<Dot>(p, work.tiles[n], work.rows[n], work, state);
    }
  }
  for (int64_t n = 0; n < count; ++n) {
    if (plan.parts == 1)
      finish_tile(p, work.tiles[n], State(work.states + n * size));
    else
      std::memcpy(plan.partial + ((index * plan.tiles + first_tile + n) * plan.parts + part) * size,
                  work.states + n * size, size * sizeof(float));
  }
  return true;
}

// Join the parts of one tile of queries, in order.
static bool join_parts(const Params& p, const ForwardPlan& plan, int64_t item, Scratch& scratch) {
  if (!scratch.reset(Scratch::bytes_for<QueryTile>(1))) return false;
  QueryTile& tile = *scratch.take<QueryTile>(1);
  const int64_t size = State::size(p), width = padded(p.head_dim_v);
  const Unit unit = Unit::at(p, item / plan.tiles);
  tile.place(p, unit.b, unit.head, unit.heads, item % plan.tiles * BLOCK_M);
  float* parts = plan.partial + item * plan.parts * size;
  State whole(parts);
  for (int64_t n = 1; n < plan.parts; ++n) {
    State part(parts + n * size);
    for (int lane = 0; lane < tile.vectors * VL; lane += VL) {
      const vf shift = whole.raise(lane, load(part.max + lane), to_power(p), width);
      const vf factor = exp2((load(part.max + lane) - shift) * to_power(p));
      store(whole.sum + lane, load(whole.sum + lane) + load(part.sum + lane) * factor);
      for (int64_t d = 0; d < width; ++d) {
        float* to = whole.out + d * BLOCK_M + lane;
        store(to, load(to) + load(part.out + d * BLOCK_M + lane) * factor);
      }
    }
  }
  finish_tile(p, tile, whole);
  return true;
}

static bool run_decode(const Params& p, const ForwardPlan& plan) {
  const int64_t size = RowState::size(p);
  const bool done = run_items(p, plan.units * plan.parts, [&](int64_t item, Scratch& scratch) {
    const int64_t first = item % plan.parts * plan.part_tiles;
    float* part = plan.parts > 1 ? plan.partial + item * size : nullptr;
    return decode_item(p, item / plan.parts, first, first + plan.part_tiles, part, scratch);
  });
  if (!done || plan.parts == 1) return done;
  return run_items(p, plan.units, [&](int64_t item, Scratch& scratch) {
    return join_decode(p, item, plan.parts, plan.partial + item * plan.parts * size, scratch);
  });
}

template <class Dot>
static bool run_wide(const Params& p, const ForwardPlan& plan) {
  const bool done = run_items(
      p, plan.items(), [&](int64_t item, Scratch& scratch) { return forward_item<Dot>(p, plan, item, scratch); });
  if (!done || plan.parts == 1) return done;
  return run_items(p, plan.units * plan.tiles,
                   [&](int64_t item, Scratch& scratch) { return join_parts(p, plan, item, scratch); });
}

template <class Dot>
static const char* run_forward(const Params& p) {
  ForwardPlan plan(p);
  if (plan.units * plan.tiles == 0) return nullptr;
  const bool decode = is_decode(p);
  Scratch partial;
  if (plan.parts > 1) {
    const int64_t floats = plan.units * plan.tiles * plan.parts * (decode ? RowState::size(p) : State::size(p));
    if (!partial.reset(Scratch::bytes_for<float>(floats))) return NO_MEMORY;
    plan.partial = partial.take<float>(floats);
  }
  return (decode ? run_decode(p, plan) : run_wide<Dot>(p, plan)) ? nullptr : NO_MEMORY;
}

}  // namespace fastattn::FASTATTN_ISA
