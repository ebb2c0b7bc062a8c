// The two kinds of packed tiles: BLOCK_M queries (with their output gradients), BLOCK_N keys (with their values).
#pragma once

#include "scores.h"

namespace fastattn::FASTATTN_ISA {

// Widths in memory: what a lane product has for rows, and a column product for columns.
INLINE int64_t padded(int64_t head_dim) { return round_up(head_dim, VL > LANE_ROWS ? VL : LANE_ROWS); }

template <class Dot>
struct KeyTile {
  using Word = typename Dot::Word;
  using Number = typename Element<Dot>::type;
  Word *k_along, *k_pairs, *v_along, *v_pairs, *cleaned;
  Number* rows;
  bool finite = true;

  static size_t bytes(const Params& p) {
    const int64_t width = padded(p.head_dim), width_v = padded(p.head_dim_v);
    const int64_t most = width > width_v ? width : width_v;
    return (2 * width + 2 * width_v + 2 * most) * BLOCK_N * sizeof(float) + 6 * 64;
  }

  void take(const Params& p, Scratch& from) {
    const int64_t width = padded(p.head_dim), width_v = padded(p.head_dim_v);
    const int64_t most = width > width_v ? width : width_v;
    k_along = from.take<Word>(BLOCK_N * width);
    k_pairs = from.take<Word>(BLOCK_N * width);
    v_along = from.take<Word>(BLOCK_N * width_v);
    v_pairs = from.take<Word>(BLOCK_N * width_v);
    cleaned = from.take<Word>(BLOCK_N * most);
    rows = from.take<Number>(BLOCK_N * most);
  }

  // Forward: keys along, values in pairs.
  void read_forward(const Params& p, int64_t b, int64_t kv_head, int64_t tile) {
    read_along(p.key, p, b, kv_head, tile, p.head_dim, k_along);
    finite = read_pairs(p.value, p, b, kv_head, tile, p.head_dim_v, v_pairs);
  }

  // Backward: keys along and in pairs, values along.
  void read_backward(const Params& p, int64_t b, int64_t kv_head, int64_t tile) {
    read_along(p.key, p, b, kv_head, tile, p.head_dim, k_along);
    finite = read_pairs(p.key, p, b, kv_head, tile, p.head_dim, k_pairs);
    read_along(p.value, p, b, kv_head, tile, p.head_dim_v, v_along);
  }

  // `pairs` as a tile of queries may use them: themselves, or a copy without the rows that none of them sees.
  const Word* clean(const Meeting& at, const QueryTile& tile, const float* scores, const Word* pairs, int64_t width) {
    if (finite || at.plain) return pairs;
    std::memcpy(cleaned, pairs, BLOCK_N / Dot::PER_WORD * width * sizeof(Word));
    clear_unseen<Dot>(at.seen(scores, tile.vectors), width, cleaned);
    return cleaned;
  }

 private:
  void read_rows(const Table& table, const Params& p, int64_t b, int64_t h, int64_t tile, int64_t n, int64_t ld,
                 Number* to) {
    const int64_t first = tile * BLOCK_N, left = p.kv_len - first, count = left < BLOCK_N ? left : BLOCK_N;
    for (int64_t j = 0; j < count; ++j) read_row(table, row_at(table, b, h, first + j), n, ld, to + j * ld);
    std::memset(static_cast<void*>(to + count * ld), 0, (BLOCK_N - count) * ld * sizeof(Number));
  }

  void read_along(const Table& table, const Params& p, int64_t b, int64_t h, int64_t tile, int64_t n, Word* to) {
    read_rows(table, p, b, h, tile, n, steps_of<Dot>(n) * Dot::PER_WORD, reinterpret_cast<Number*>(to));
  }

  bool read_pairs(const Table& table, const Params& p, int64_t b, int64_t h, int64_t tile, int64_t n, Word* to) {
    const int64_t width = padded(n);
    if constexpr (Dot::PER_WORD == 1) {
      read_rows(table, p, b, h, tile, n, width, to);
      return all_finite(to, BLOCK_N * width);
    } else {
      read_rows(table, p, b, h, tile, n, width, rows);
      to_pairs(rows, width, BLOCK_N, to);
      return all_finite(rows, BLOCK_N * width);
    }
  }
};

// One tensor's rows at the queries of a tile.
template <class Dot>
struct QueryRows {
  using Word = typename Dot::Word;
  using Number = typename Element<Dot>::type;
  Word *across, *pairs;
  Number* rows;

  static size_t bytes(int64_t head_dim, bool with_pairs) {
    return (with_pairs ? 3 : 2) * Scratch::bytes_for<float>(BLOCK_M * padded(head_dim));
  }

  void take(int64_t head_dim, bool with_pairs, Scratch& from) {
    across = from.take<Word>(BLOCK_M * padded(head_dim));
    pairs = with_pairs ? from.take<Word>(BLOCK_M * padded(head_dim)) : nullptr;
    rows = from.take<Number>(BLOCK_M * padded(head_dim));
  }

  // Lanes out of use are 0, and so are those whose `lse`, where given, says that they see nothing.
  void read(const Table& table, const QueryTile& tile, int64_t n, const float* lse) {
    const int64_t width = padded(n);
    for (int lane = 0; lane < BLOCK_M; ++lane) {
      Number* to = rows + lane * width;
      if (lane < tile.count && !(lse && lse[lane] == -kInfinity))
        read_row(table, row_at(table, tile.b, tile.head[lane], tile.q_idx[lane]), n, width, to);
      else
        std::memset(static_cast<void*>(to), 0, width * sizeof(Number));
    }
    to_across<Dot>(rows, width, n, across);
    if (pairs) to_pairs(rows, width, BLOCK_M, pairs);
  }
};

// [width][BLOCK_M] floats, times a factor for each lane, to the rows of a tensor.
static void write_lanes(const Table& table, const QueryTile& tile, int64_t n, const float* from, const float* factor) {
  float row[512];
  for (int lane = 0; lane < tile.count; ++lane)
    for (int64_t first = 0; first < n; first += 512) {
      const int64_t count = n - first < 512 ? n - first : 512;
      for (int64_t d = 0; d < count; ++d) row[d] = from[(first + d) * BLOCK_M + lane] * factor[lane];
      write_row(table, tile.b, tile.head[lane], tile.q_idx[lane], first, count, row);
    }
}

}  // namespace fastattn::FASTATTN_ISA
