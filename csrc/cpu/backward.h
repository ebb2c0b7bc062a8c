// Backward, in one pass over the pairs of tiles (five products each). An item of work owns a part of one key head's
// keys and gathers their dk and dv over all queries of all heads that read them; queries are packed a chunk at a time,
// and a chunk's dq is complete for the part when the chunk is done. Parts then add to dq one after another, in their
// order: each waits for its turn at a chunk, and since items start in order too, whoever is waited for is at work, or
// has found no memory, which ends all waiting.
#pragma once

#include <sched.h>

#include "dbias.h"

namespace fastattn::FASTATTN_ISA {

constexpr int64_t CHUNK_TILES = 8;                        // of queries
constexpr int64_t PART_TILES = 64, LEAST_PART_TILES = 4;  // of keys
constexpr int64_t ENOUGH_PARTS = 32;
constexpr int64_t WAVE_FLOATS = int64_t{8} << 20;  // of unfinished dq at a time, where keys are split

struct BackwardPlan {
  int64_t groups, kv_tiles, parts, part_tiles, streams, tiles, chunks, wave, dq_floats;
  float* dq = nullptr;                   // [groups of a wave][streams][tiles][gathered_rows][BLOCK_M]
  std::atomic<int32_t>* turn = nullptr;  // [groups of a wave][streams][chunks]: the part that may add next
  float* p_dp_rowsum = nullptr;          // [batch, num_heads, q_len], where somebody wants it
  mutable std::atomic<bool> failed{false};

  explicit BackwardPlan(const Params& p) {
    groups = p.batch * p.num_kv_heads;
    kv_tiles = (p.kv_len + BLOCK_N - 1) / BLOCK_N;
    const int64_t need = (kv_tiles + PART_TILES - 1) / PART_TILES, most = kv_tiles / LEAST_PART_TILES;
    int64_t wish = groups ? (ENOUGH_PARTS + groups - 1) / groups : 1;
    wish = wish > most ? most : wish;
    parts = wish > need ? wish : need;
    parts = parts < 1 ? 1 : parts;
    part_tiles = (kv_tiles + parts - 1) / parts;
    streams = Unit::folds_group(p) ? 1 : p.group;
    tiles = Unit::tiles(p);
    chunks = (tiles + CHUNK_TILES - 1) / CHUNK_TILES;
    dq_floats = streams * tiles * gathered_rows(p) * BLOCK_M;
    wave = parts == 1 || dq_floats == 0 ? groups : WAVE_FLOATS / dq_floats;
    wave = wave < 1 ? 1 : wave > groups ? groups : wave;
  }
};

template <class Dot>
struct BackwardWork {
  GradientWork<Dot> step;
  GradientTile<Dot> rows[CHUNK_TILES];
  float *dk, *dv;  // [part_tiles][BLOCK_N][width]

  bool take(const Params& p, const BackwardPlan& plan, Scratch& from) {
    const int64_t keys = plan.part_tiles * BLOCK_N;
    const int64_t size_k = keys * padded(p.head_dim), size_v = keys * padded(p.head_dim_v);
    const int64_t chunk = plan.tiles < CHUNK_TILES ? plan.tiles : CHUNK_TILES;
    if (!from.reset(GradientWork<Dot>::bytes(p) + chunk * GradientTile<Dot>::bytes(p) +
                    Scratch::bytes_for<float>(size_k) + Scratch::bytes_for<float>(size_v)))
      return false;
    step.take(p, from);
    for (int64_t n = 0; n < chunk; ++n) rows[n].take(p, from);
    dk = from.take<float>(size_k);
    dv = from.take<float>(size_v);
    std::memset(dk, 0, size_k * sizeof(float));
    std::memset(dv, 0, size_v * sizeof(float));
    return true;
  }
};

// One tile of keys for one tile of queries.
template <class Dot>
static void backward_step(const Params& p, GradientTile<Dot>& rows, GradientWork<Dot>& work, float* dk, float* dv) {
  const int64_t width = padded(p.head_dim), width_v = padded(p.head_dim_v);
  const int vectors = rows.tile->vectors;
  const int64_t steps = vectors * VL / Dot::PER_WORD, row = BLOCK_M / Dot::PER_WORD;
  const auto* pairs = gradient_step<Dot>(p, rows, work);
  const TilePair& at = work.at;
  const int keys = at.high - at.low;
  const float *weight = work.weight + at.low * BLOCK_M, *d_score = work.d_score + at.low * BLOCK_M;
  dk += at.low * width;
  dv += at.low * width_v;
  const auto* weights = weight_rows<Dot>(keys, weight, work.words);
  column_product<Dot>(keys, width_v, steps, weights, row, rows.d_out.pairs, dv);
  if (owns_dbias(p)) store_dbias(p, *rows.tile, at, work.d_score, at.bias_rows);
  if (p.softcap != 0.0f) multiply(at, work.d_score, work.slope);
  const auto* d_scores = weight_rows<Dot>(keys, d_score, work.words);
  column_product<Dot>(keys, width, steps, d_scores, row, rows.query.pairs, dk);
  const auto* d_pairs = weight_pairs<Dot>(vectors, keys, d_score, work.words);
  const PairsOf<Dot> form(width);
  const auto* seen_pairs = pairs + words_of<Dot>(at.low) * form.step;
  lane_product<Dot, true>(vectors, width, keys / Dot::PER_WORD, seen_pairs, form.row, form.step, d_pairs, rows.dq);
}

// Add a finished chunk to dq, in turn; the last part writes it out. False where the turn will not come.
template <class Dot>
static bool add_dq(const Params& p, const BackwardPlan& plan, int64_t slot, int64_t part, int64_t stream, int64_t chunk,
                   int64_t count, GradientTile<Dot>* rows) {
  const int64_t size = gathered_rows(p) * BLOCK_M;
  float factor[BLOCK_M];
  for (int lane = 0; lane < BLOCK_M; ++lane) factor[lane] = p.scale;
  std::atomic<int32_t>* turn = nullptr;
  if (plan.parts > 1) {
    turn = plan.turn + (slot * plan.streams + stream) * plan.chunks + chunk;
    while (turn->load(std::memory_order_acquire) != part) {
      if (plan.failed.load(std::memory_order_relaxed)) return false;
      sched_yield();
    }
  }
  for (int64_t n = 0; n < count; ++n) {
    if (part > 0 || part + 1 < plan.parts) {
      float* sum = plan.dq + slot * plan.dq_floats + (stream * plan.tiles + chunk * CHUNK_TILES + n) * size;
      if (part == 0)
        std::memcpy(sum, rows[n].dq, size * sizeof(float));
      else
        for (int64_t at = 0; at < size; at += VL) {
          const vf both = load(sum + at) + load(rows[n].dq + at);
          store(sum + at, both);
          store(rows[n].dq + at, both);
        }
    }
    if (part + 1 < plan.parts) continue;
    const QueryTile& tile = *rows[n].tile;
    write_lanes(p.dq, tile, p.head_dim, rows[n].dq, factor, Table());
    for (int lane = 0; plan.p_dp_rowsum && lane < tile.count; ++lane) {
      const int64_t row = (tile.b * p.num_heads + tile.head[lane]) * p.q_len + tile.q_idx[lane];
      plan.p_dp_rowsum[row] = rows[n].p_dp_rowsum(p)[lane] * RowTerms(p).share[row];
    }
  }
  if (turn) turn->store(static_cast<int32_t>(part) + 1, std::memory_order_release);
  return true;
}

// [rows][width] floats, times a factor, to the rows of a tensor from `first` on.
static void write_keys(const Params& p, const Table& table, int64_t group, int64_t first, int64_t last, int64_t n,
                       float factor, float* from) {
  const int64_t width = padded(n);
  for (int64_t j = first; j < last; ++j, from += width) {
    for (int64_t d = 0; d < width; d += VL) store(from + d, load(from + d) * factor);
    write_row(table, group / p.num_kv_heads, group % p.num_kv_heads, j, 0, n, from);
  }
}

template <class Dot>
static bool backward_item(const Params& p, const BackwardPlan& plan, int64_t first_group, int64_t item,
                          Scratch& scratch) {
  BackwardWork<Dot> work;
  if (!work.take(p, plan, scratch)) {
    plan.failed.store(true, std::memory_order_relaxed);
    return false;
  }
  const int64_t slot = item / plan.parts, part = item % plan.parts, group = first_group + slot;
  const int64_t b = group / p.num_kv_heads, kv_head = group % p.num_kv_heads;
  const int64_t part_first = part * plan.part_tiles, end = part_first + plan.part_tiles;
  const int64_t part_last = end < plan.kv_tiles ? end : plan.kv_tiles;
  const int64_t width = padded(p.head_dim), width_v = padded(p.head_dim_v);
  for (int64_t stream = 0; stream < plan.streams; ++stream) {
    const int64_t head = kv_head * p.group + stream, heads = plan.streams == 1 ? p.group : 1;
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const int64_t left = plan.tiles - chunk * CHUNK_TILES, count = left < CHUNK_TILES ? left : CHUNK_TILES;
      int64_t first = INT64_MAX, last = 0;
      for (int64_t n = 0; n < count; ++n) {
        work.rows[n].tile->place(p, b, head, heads, (chunk * CHUNK_TILES + n) * BLOCK_M);
        int64_t from, to;
        work.rows[n].tile->tiles(&from, &to);
        if (from >= to) continue;
        first = from < first ? from : first;
        last = to > last ? to : last;
      }
      first = first < part_first ? part_first : first;
      last = last > part_last ? part_last : last;
      for (int64_t n = 0; n < count; ++n)
        if (first < last)
          work.rows[n].read(p);
        else
          work.rows[n].clear(p);
      for (int64_t kv_tile = first; kv_tile < last; ++kv_tile) {
        const int64_t at = (kv_tile - part_first) * BLOCK_N;
        bool packed = false;
        for (int64_t n = 0; n < count; ++n) {
          if (!work.step.at.classify(p, *work.rows[n].tile, kv_tile)) continue;
          if (!packed) work.step.keys.read_backward(p, b, kv_head, kv_tile);
          packed = true;
          backward_step<Dot>(p, work.rows[n], work.step, work.dk + at * width, work.dv + at * width_v);
        }
      }
      if (!add_dq<Dot>(p, plan, slot, part, stream, chunk, count, work.rows)) return false;
    }
  }
  const int64_t first = part_first * BLOCK_N, stop = part_last * BLOCK_N, last = stop < p.kv_len ? stop : p.kv_len;
  write_keys(p, p.dk, group, first, last, p.head_dim, p.scale, work.dk);
  write_keys(p, p.dv, group, first, last, p.head_dim_v, 1.0f, work.dv);
  return true;
}

template <class Dot>
static const char* run_backward(const Params& p) {
  const bool sums_bias = p.dbias.data && !owns_dbias(p);
  BackwardPlan plan(p);
  Scratch memory;
  const int64_t rows = p.dsinks || sums_bias ? p.batch * p.num_heads * p.q_len : 0;
  const int64_t turns = plan.parts > 1 ? plan.wave * plan.streams * plan.chunks : 0;
  const int64_t floats = turns ? plan.wave * plan.dq_floats : 0;
  if (!memory.reset(Scratch::bytes_for<float>(floats) + Scratch::bytes_for<std::atomic<int32_t>>(turns) +
                    Scratch::bytes_for<float>(rows)))
    return NO_MEMORY;
  plan.dq = memory.take<float>(floats);
  plan.turn = memory.take<std::atomic<int32_t>>(turns);
  if (rows) plan.p_dp_rowsum = memory.take<float>(rows);
  run_row_terms(p);
  for (int64_t first = 0; first < plan.groups; first += plan.wave) {
    for (int64_t n = 0; n < turns; ++n) plan.turn[n].store(0, std::memory_order_relaxed);
    const int64_t left = plan.groups - first, groups = left < plan.wave ? left : plan.wave;
    const bool done = run_items(p, groups * plan.parts, [&](int64_t item, Scratch& scratch) {
      return backward_item<Dot>(p, plan, first, item, scratch);
    });
    if (!done) return NO_MEMORY;
  }
  if (p.dsinks || sums_bias) finish_row_terms(p, plan.p_dp_rowsum);
  return sums_bias ? run_dbias<Dot>(p) : nullptr;
}

}  // namespace fastattn::FASTATTN_ISA
