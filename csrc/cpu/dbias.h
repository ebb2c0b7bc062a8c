// The bias's gradient. Where every pair has its own number, the backward pass stores it. Where a number is shared, an
// item of work owns it: it goes through all pairs that share it, in one order, and computes their gradients again.
#pragma once

#include "gradient_step.h"

namespace fastattn::FASTATTN_ISA {

static bool owns_dbias(const Params& p) {
  return p.dbias.data && p.bias_shape[0] == p.batch && p.bias_shape[1] == p.num_heads && p.bias_shape[2] == p.q_len &&
         p.bias_shape[3] == p.kv_len;
}

// [BLOCK_N][BLOCK_M] gradients of a tile of pairs to their places; the tile's queries may be of several heads. `rows`
// is scratch, [BLOCK_M][BLOCK_N].
static void store_dbias(const Params& p, const QueryTile& tile, const TilePair& at, const float* from, float* rows) {
  const int64_t left = p.kv_len - at.first, last = left < at.high ? left : at.high;
  if (at.low >= last) return;
  transpose(from + at.low * BLOCK_M, BLOCK_M, last - at.low, tile.vectors * VL, rows, BLOCK_N);
  for (int lane = 0; lane < tile.count; ++lane)
    write_row(p.dbias, tile.b, tile.head[lane], tile.q_idx[lane], at.first + at.low, last - at.low,
              rows + lane * BLOCK_N);
}

template <class Dot>
struct BiasWork {
  GradientWork<Dot> step;
  GradientTile<Dot> rows;
  float* sum;  // [BLOCK_N][BLOCK_M]

  bool take(const Params& p, Scratch& from) {
    if (!from.reset(GradientWork<Dot>::bytes(p) + GradientTile<Dot>::bytes(p) + Scratch::bytes_for<float>(TILE)))
      return false;
    step.take(p, from);
    rows.take(p, from);
    sum = from.take<float>(TILE);
    std::memset(sum, 0, TILE * sizeof(float));
    return true;
  }
};

// What one item shares: a tile of the bias, in dimensions of size 1 standing for all tiles.
struct BiasItem {
  int64_t b, h, q_tile, kv_tile;
};

// Sums over lanes where queries share, over keys where keys share, and stores.
static void finish_dbias(const Params& p, const BiasItem& item, float* sum) {
  const int64_t *shape = p.bias_shape, q_first = item.q_tile * BLOCK_M, kv_first = item.kv_tile * BLOCK_N;
  const int64_t q_left = p.q_len - q_first, kv_left = p.kv_len - kv_first;
  const int64_t rows = shape[2] == 1 ? 1 : q_left < BLOCK_M ? q_left : BLOCK_M;
  const int64_t columns = shape[3] == 1 ? 1 : kv_left < BLOCK_N ? kv_left : BLOCK_N;
  for (int64_t j = 0; j < BLOCK_N && shape[2] == 1; ++j)
    for (int lane = 1; lane < BLOCK_M; ++lane) sum[j * BLOCK_M] += sum[j * BLOCK_M + lane];
  for (int64_t j = 1; j < BLOCK_N && shape[3] == 1; ++j)
    for (int lane = 0; lane < BLOCK_M; ++lane) sum[lane] += sum[j * BLOCK_M + lane];
  float* to = static_cast<float*>(p.dbias.data) + (item.b * shape[1] + item.h) * shape[2] * shape[3];
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      to[(shape[2] == 1 ? 0 : q_first + i) * shape[3] + (shape[3] == 1 ? 0 : kv_first + j)] = sum[j * BLOCK_M + i];
}

template <class Dot>
static bool dbias_item(const Params& p, const BiasItem& item, int64_t q_tiles, int64_t kv_tiles, Scratch& scratch) {
  BiasWork<Dot> work;
  if (!work.take(p, scratch)) return false;
  const int64_t* shape = p.bias_shape;
  const auto range = [](bool shared, int64_t own, int64_t all, int64_t* last) {
    *last = shared ? all : own + 1;
    return shared ? 0 : own;
  };
  int64_t last_b, last_h, last_q, last_kv;
  for (int64_t b = range(shape[0] == 1, item.b, p.batch, &last_b); b < last_b; ++b)
    for (int64_t h = range(shape[1] == 1, item.h, p.num_heads, &last_h); h < last_h; ++h)
      for (int64_t q = range(shape[2] == 1, item.q_tile, q_tiles, &last_q); q < last_q; ++q) {
        bool read = false;
        work.rows.tile->place(p, b, h, 1, q * BLOCK_M);
        for (int64_t kv = range(shape[3] == 1, item.kv_tile, kv_tiles, &last_kv); kv < last_kv; ++kv) {
          if (!work.step.at.classify(p, *work.rows.tile, kv)) continue;
          if (!read) work.rows.read(p);
          read = true;
          work.step.keys.read_backward(p, b, h / p.group, kv);
          gradient_step<Dot>(p, work.rows, work.step);
          const int lanes = work.rows.tile->vectors * VL;
          for (int j = work.step.at.low; j < work.step.at.high; ++j)
            for (int n = 0; n < lanes; n += VL) {
              float* to = work.sum + j * BLOCK_M + n;
              store(to, load(to) + load(work.step.d_score + j * BLOCK_M + n));
            }
        }
      }
  finish_dbias(p, item, work.sum);
  return true;
}

template <class Dot>
static const char* run_dbias(const Params& p) {
  const int64_t q_tiles = (p.q_len + BLOCK_M - 1) / BLOCK_M, kv_tiles = (p.kv_len + BLOCK_N - 1) / BLOCK_N;
  const int64_t *shape = p.bias_shape, own_q = shape[2] == 1 ? 1 : q_tiles, own_kv = shape[3] == 1 ? 1 : kv_tiles;
  const bool done = run_items(p, shape[0] * shape[1] * own_q * own_kv, [&](int64_t index, Scratch& scratch) {
    const int64_t head = index / own_kv / own_q;
    const BiasItem item{head / shape[1], head % shape[1], index / own_kv % own_q, index % own_kv};
    return dbias_item<Dot>(p, item, q_tiles, kv_tiles, scratch);
  });
  return done ? nullptr : NO_MEMORY;
}

}  // namespace fastattn::FASTATTN_ISA
