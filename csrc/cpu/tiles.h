// The two kinds of packed tiles: BLOCK_M queries (with their output gradients), BLOCK_N keys (with their values).
#pragma once

#include "scores.h"

namespace fastattn::FASTATTN_ISA {

// Widths in memory: what a lane product has for rows, and a column product for columns.
INLINE int64_t padded(int64_t head_dim) { return round_up(head_dim, WIDTH_STEP); }

// A word's numbers share an operand's row: [rows][width] numbers are [rows][words_of(width)] words.
template <class Dot>
INLINE int64_t words_of(int64_t width) {
  return width / Dot::PER_WORD;
}

template <class Dot>
INLINE const typename Dot::Word* along(const typename Element<Dot>::type* rows) {
  return reinterpret_cast<const typename Dot::Word*>(rows);
}

template <class Dot>
struct KeyTile {
  using Word = typename Dot::Word;
  using Number = typename Element<Dot>::type;
  static constexpr bool HALF = Dot::PER_WORD == 2;
  Number *k, *v;          // [BLOCK_N][width]
  Word *pairs, *cleaned;  // of the values forward, of the keys backward, as PairsOf says
  bool finite = true;

  static int64_t most(const Params& p) { return padded(p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v); }
  static size_t bytes(const Params& p) { return 4 * Scratch::bytes_for<float>(BLOCK_N * most(p)); }

  void take(const Params& p, Scratch& from) {
    k = from.take<Number>(BLOCK_N * most(p));
    v = from.take<Number>(BLOCK_N * most(p));
    pairs = HALF ? from.take<Word>(BLOCK_N / 2 * most(p)) : nullptr;
    cleaned = from.take<Word>(BLOCK_N / Dot::PER_WORD * most(p));
  }

  void read_keys(const Params& p, int64_t b, int64_t kv_head, int64_t tile) {
    read_rows(p.key, p, b, kv_head, tile, p.head_dim, k);
  }

  void read_forward(const Params& p, int64_t b, int64_t kv_head, int64_t tile) {
    read_keys(p, b, kv_head, tile);
    read_rows(p.value, p, b, kv_head, tile, p.head_dim_v, v);
    pair_up(v, padded(p.head_dim_v));
  }

  void read_backward(const Params& p, int64_t b, int64_t kv_head, int64_t tile) {
    read_keys(p, b, kv_head, tile);
    read_rows(p.value, p, b, kv_head, tile, p.head_dim_v, v);
    pair_up(k, padded(p.head_dim));
  }

  // `pairs` as a tile of queries may use them: themselves, or a copy without the rows that none of them sees.
  const Word* clean(const TilePair& at, const QueryTile& tile, const float* scores, int64_t width) {
    if (finite || at.plain) return pairs;
    std::memcpy(cleaned, pairs, BLOCK_N / Dot::PER_WORD * width * sizeof(Word));
    clear_unseen<Dot>(at.seen(scores, tile.vectors), width, cleaned);
    return cleaned;
  }

 private:
  void read_rows(const Table& table, const Params& p, int64_t b, int64_t h, int64_t tile, int64_t n, Number* to) {
    const int64_t first = tile * BLOCK_N, left = p.kv_len - first, count = left < BLOCK_N ? left : BLOCK_N;
    const int64_t width = padded(n);
    for (int64_t j = 0; j < count; ++j) read_row(table, row_at(table, b, h, first + j), n, width, to + j * width);
    std::memset(static_cast<void*>(to + count * width), 0, (BLOCK_N - count) * width * sizeof(Number));
  }

  void pair_up(Number* rows, int64_t width) {
    finite = all_finite(rows, BLOCK_N * width);
    if constexpr (!HALF) {
      pairs = rows;
    } else if constexpr (IS_TILED<Dot>) {
      to_pairs(rows, width, BLOCK_N, cleaned);
      transpose(cleaned, width, BLOCK_N / 2, width, pairs, BLOCK_N / 2);
    } else {
      to_pairs(rows, width, BLOCK_N, pairs);
    }
  }
};

// One tensor's rows at the queries of a tile.
template <class Dot>
struct QueryRows {
  using Word = typename Dot::Word;
  using Number = typename Element<Dot>::type;
  static constexpr bool HALF = Dot::PER_WORD == 2;
  Word *across, *pairs;
  Number* rows;

  static size_t bytes(int64_t head_dim, bool with_pairs) {
    return (with_pairs && HALF ? 3 : 2) * Scratch::bytes_for<float>(BLOCK_M * padded(head_dim));
  }

  void take(int64_t head_dim, bool with_pairs, Scratch& from) {
    across = from.take<Word>(BLOCK_M * padded(head_dim));
    rows = from.take<Number>(BLOCK_M * padded(head_dim));
    pairs = with_pairs && HALF ? from.take<Word>(BLOCK_M * padded(head_dim)) : nullptr;
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
    to_across<Dot>(rows, width, across);
    if constexpr (HALF) {
      if (pairs) to_pairs(rows, width, BLOCK_M, pairs);
    } else {
      pairs = rows;
    }
  }
};

// [width][BLOCK_M] floats, times a factor for each lane, to the rows of a tensor, and what its rounding takes to `low`.
static void write_lanes(const Table& table, const QueryTile& tile, int64_t n, const float* from, const float* factor,
                        const Table& low) {
  constexpr int64_t PIECE = 64;
  alignas(64) float rows[BLOCK_M * PIECE];
  for (int64_t first = 0; first < n; first += PIECE) {
    const int64_t count = n - first < PIECE ? n - first : PIECE;
    transpose(from + first * BLOCK_M, BLOCK_M, count, BLOCK_M, rows, PIECE);
    for (int lane = 0; lane < tile.count; ++lane) {
      float* row = rows + lane * PIECE;
      for (int64_t d = 0; d < count; d += VL) store(row + d, load(row + d) * factor[lane]);
      write_row(table, tile.b, tile.head[lane], tile.q_idx[lane], first, count, row);
      write_low(low, table, tile.b, tile.head[lane], tile.q_idx[lane], first, count, row);
    }
  }
}

}  // namespace fastattn::FASTATTN_ISA
