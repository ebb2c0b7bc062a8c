// BLOCK_M queries, one a lane: who they are, what they see, and which tiles of keys that makes them visit.
#pragma once

#include "../common/mask.h"
#include "pack.h"

namespace fastattn::FASTATTN_ISA {

// Query rows that share keys: one head's, or, where there are few, those of all heads of a group one after another.
struct Unit {
  int64_t b, kv_head, head, heads;

  static bool folds_group(const Params& p) {
    return p.group > 1 && p.q_len < BLOCK_M && p.mask.is_intervals();
  }
  static int64_t count(const Params& p) { return p.batch * (folds_group(p) ? p.num_kv_heads : p.num_heads); }
  static int64_t rows(const Params& p) { return folds_group(p) ? p.group * p.q_len : p.q_len; }

  Unit(const Params& p, int64_t index) {
    heads = folds_group(p) ? p.group : 1;
    const int64_t per_batch = p.num_heads / heads;
    b = index / per_batch;
    head = index % per_batch * heads;
    kv_head = head / p.group;
  }
};

struct QueryTile {
  int64_t b;
  int count;  // lanes in use
  int32_t head[BLOCK_M], q_idx[BLOCK_M];
  alignas(64) int32_t start[2][BLOCK_M], stop[2][BLOCK_M];
  Span span[2];
  int spans;
  const uint8_t* classes;
  int64_t class_step, kv_len;

  void place(const Params& p, const Unit& unit, int64_t first) {
    b = unit.b;
    kv_len = p.kv_len;
    const int64_t left = Unit::rows(p) - first;
    count = static_cast<int>(left < BLOCK_M ? left : BLOCK_M);
    for (int lane = 0; lane < BLOCK_M; ++lane) {
      const int64_t row = first + (lane < count ? lane : 0);
      head[lane] = static_cast<int32_t>(unit.head + row / p.q_len);
      q_idx[lane] = static_cast<int32_t>(row % p.q_len);
    }
    classes = p.mask.tile_class;
    spans = 0;
    if (classes) {
      const int64_t* stride = p.mask.tile_stride;
      classes += b * stride[0] + unit.head * stride[1] + first / BLOCK_M * stride[2];
      class_step = stride[3];
      return;
    }
    spans = p.mask.leaves ? p.mask.leaves : 1;
    for (int n = 0; n < spans; ++n) read_interval(n, p.mask.leaves ? &p.mask.leaf[n] : nullptr);
  }

  // Tiles of keys that may hold something visible lie in [first, last).
  void tiles(int64_t* first, int64_t* last) const {
    *first = 0;
    *last = (kv_len + BLOCK_N - 1) / BLOCK_N;
    if (classes) return;
    int64_t lo = kv_len, hi = 0;
    for (int n = 0; n < spans; ++n) {
      lo = span[n].lo < lo ? span[n].lo : lo;
      hi = span[n].hi > hi ? span[n].hi : hi;
    }
    *first = lo / BLOCK_N;
    *last = hi > lo ? (hi + BLOCK_N - 1) / BLOCK_N : *first;
  }

  TileClass tile_class(int64_t tile) const {
    if (classes) return static_cast<TileClass>(classes[tile * class_step]);
    const int64_t first = tile * BLOCK_N, last = first + BLOCK_N;
    TileClass found = kSkip;
    for (int n = 0; n < spans; ++n) {
      if (span[n].covers(first, last)) return kFull;
      if (span[n].touches(first, last)) found = kCheck;
    }
    return found;
  }

 private:
  void read_interval(int n, const MaskLeaf* leaf) {
    span[n] = Span();
    for (int lane = 0; lane < BLOCK_M; ++lane) {
      int32_t from = 0, to = static_cast<int32_t>(kv_len);
      if (leaf) {
        const int64_t at = b * leaf->stride[0] + head[lane] * leaf->stride[1] + q_idx[lane] * leaf->stride[2];
        from = leaf->start[at];
        to = leaf->stop[at];
      }
      if (lane < count) span[n].add(from, to);
      start[n][lane] = from;
      stop[n][lane] = lane < count ? to : from;
    }
  }
};

// The queries' visibility of BLOCK_N keys from `first` on by the whole mask program, a byte each.
static const uint8_t* evaluate_mask(const Params& p, const QueryTile& tile, int64_t first, uint8_t* stack) {
  constexpr int64_t SIZE = BLOCK_N * BLOCK_M;
  uint8_t* top = stack;
  for (int w = 0; w < p.mask.words; ++w) {
    const int32_t word = p.mask.word[w];
    if (word < 0) {
      top -= SIZE;
      uint8_t* under = top - SIZE;
      for (int64_t at = 0; at < SIZE; ++at) under[at] = word == kAnd ? under[at] & top[at] : under[at] | top[at];
      continue;
    }
    const MaskLeaf& leaf = p.mask.leaf[word];
    for (int lane = 0; lane < BLOCK_M; ++lane) {
      const int64_t h = tile.head[lane], i = tile.q_idx[lane];
      const int64_t at = tile.b * leaf.stride[0] + h * leaf.stride[1] + i * leaf.stride[2];
      for (int j = 0; j < BLOCK_N; ++j) {
        const int64_t kv_idx = first + j;
        bool seen = lane < tile.count && kv_idx < p.kv_len;
        if (seen && leaf.kind == kInterval) seen = keep_interval(kv_idx, leaf.start[at], leaf.stop[at]);
        if (seen && leaf.kind == kElements) seen = leaf.elements[at + kv_idx * leaf.stride[3]] != 0;
        if (seen && leaf.kind == kIds) {
          const int64_t* kv_ids = leaf.kv_ids + tile.b * leaf.kv_id_stride[0];
          seen = keep_ids(leaf.q_ids[at], kv_ids[kv_idx * leaf.kv_id_stride[1]]);
        }
        top[j * BLOCK_M + lane] = seen;
      }
    }
    top += SIZE;
  }
  return stack;
}

}  // namespace fastattn::FASTATTN_ISA
