// The step that the backward passes share: from one tile of queries and one of keys to the gradient of their scores.
#pragma once

#include "row_terms.h"
#include "tiles.h"

namespace fastattn::FASTATTN_ISA {

// Rows of BLOCK_M numbers that a tile of queries gathers: its dq, transposed, and its p_dp_rowsum (row_terms.h).
INLINE int64_t gathered_rows(const Params& p) { return padded(p.head_dim) + 1; }

// A tile of queries as the backward passes need it.
template <class Dot>
struct GradientTile {
  QueryTile* tile;
  QueryRows<Dot> query, d_out;
  // [BLOCK_M]; lse is inf where nothing is seen and NaN where a score overflows, low in powers of two.
  float *lse, *low, *share, *shift, *d_lse;
  float* dq;   // [gathered_rows][BLOCK_M]
  bool exact;  // lse and low are those of the forward over these very keys, to the last bit
  bool alone;  // and all the keys that the queries may see are of one tile

  float* p_dp_rowsum(const Params& p) const { return dq + padded(p.head_dim) * BLOCK_M; }

  static size_t bytes(const Params& p) {
    return Scratch::bytes_for<QueryTile>(1) + QueryRows<Dot>::bytes(p.head_dim, true) +
           QueryRows<Dot>::bytes(p.head_dim_v, true) + 5 * Scratch::bytes_for<float>(BLOCK_M) +
           Scratch::bytes_for<float>(BLOCK_M * gathered_rows(p));
  }

  void take(const Params& p, Scratch& from) {
    tile = from.take<QueryTile>(1);
    query.take(p.head_dim, true, from);
    d_out.take(p.head_dim_v, true, from);
    lse = from.take<float>(BLOCK_M);
    low = from.take<float>(BLOCK_M);
    share = from.take<float>(BLOCK_M);
    shift = from.take<float>(BLOCK_M);
    d_lse = from.take<float>(BLOCK_M);
    dq = from.take<float>(BLOCK_M * gathered_rows(p));
  }

  void read(const Params& p) {
    const RowTerms terms(p);
    float given[BLOCK_M];
    exact = p.lse_low != nullptr;
    for (int lane = 0; lane < BLOCK_M; ++lane) {
      const int64_t row = (tile->b * p.num_heads + tile->head[lane]) * p.q_len + tile->q_idx[lane];
      given[lane] = lane < tile->count ? p.lse[row] : -kInfinity;
      const bool none = given[lane] == -kInfinity;
      lse[lane] = none ? kInfinity : given[lane] == kInfinity ? NAN : given[lane];
      low[lane] = none ? 0.0f : known_low(p, row) * kLog2E;
      exact = exact && (none || p.lse_low[row] == p.lse_low[row]);
      share[lane] = none ? 0.0f : terms.share[row];
      shift[lane] = none ? 0.0f : terms.shift[row];
      d_lse[lane] = none || !p.d_lse ? 0.0f : p.d_lse[row];
    }
    int64_t first, last;
    tile->tiles(&first, &last);
    alone = exact && last - first == 1;
    query.read(p.query, *tile, p.head_dim, given);
    d_out.read(p.d_out, *tile, p.head_dim_v, given);
    clear(p);
  }
  void clear(const Params& p) { std::memset(dq, 0, BLOCK_M * gathered_rows(p) * sizeof(float)); }
};

// Scratch of one pair.
template <class Dot>
struct GradientWork {
  using Word = typename Dot::Word;
  KeyTile<Dot> keys;
  TilePair at;
  float *weight, *d_score, *slope;  // [BLOCK_N][BLOCK_M]
  Word* words;

  static size_t bytes(const Params& p) {
    return KeyTile<Dot>::bytes(p) + TilePair::bytes() + 4 * Scratch::bytes_for<float>(TILE);
  }

  void take(const Params& p, Scratch& from) {
    keys.take(p, from);
    at.take(from);
    weight = from.take<float>(TILE);
    d_score = from.take<float>(TILE);
    slope = from.take<float>(TILE);
    words = from.take<Word>(TILE);
  }
};

// Fills work.weight, with sinks and dropout in it, and work.d_score, the gradient of the scores before the bias and
// after the soft cap, for the keys that are worth a look; work.slope is the soft cap's. Gives the keys for the product
// with d_score.
template <class Dot>
static const typename Dot::Word* gradient_step(const Params& p, GradientTile<Dot>& rows, GradientWork<Dot>& work) {
  const QueryTile& tile = *rows.tile;
  const TilePair& at = work.at;
  const int64_t width = padded(p.head_dim), width_v = padded(p.head_dim_v);
  float *s = work.weight, *d = work.d_score;
  const int64_t keys = at.high - at.low, first = at.low * BLOCK_M;
  const int64_t row = words_of<Dot>(width), row_v = words_of<Dot>(width_v);
  lane_product<Dot, false>(tile.vectors, keys, steps_of<Dot>(p.head_dim), along<Dot>(work.keys.k) + at.low * row, row,
                           1, rows.query.across, s + first);
  lane_product<Dot, false>(tile.vectors, keys, steps_of<Dot>(p.head_dim_v), along<Dot>(work.keys.v) + at.low * row_v,
                           row_v, 1, rows.d_out.across, d + first);
  if (!at.plain) finish_scores(p, tile, at, s, p.softcap != 0.0f ? work.slope : nullptr);
  const auto* cleaned = work.keys.clean(at, tile, s, width);
  if (p.drop_below) dropout_factors(p, tile, at.first, at.low, at.high, at.dropout);
  // Beside an exact lse the weights are the forward's, however large the scores. An lse without its low part holds the
  // rounding of the largest score, which cancels only against the same rounding.
  if (!rows.exact) round_scores(p, at, s);
  const vf unit = splat(rows.exact ? to_score(p) : 1.0f);
  for (int n = 0; n < tile.vectors * VL; n += VL) {
    const vf lse = load(rows.lse + n), low = load(rows.low + n), share = load(rows.share + n);
    // exp(score - lse), at most 1 however lse is rounded, and the gradient of the weight before dropout.
    const auto pair_terms = [&](int64_t pair, vf* whole, vf* d_weight, vf* kept) {
      const vf score = load(s + pair);
      *whole = exp2(at_most_zero(product_less(score, unit, lse) * kLog2E - low));
      *d_weight = load(d + pair);
      if (!at.plain) *d_weight = score == splat(-kInfinity) ? vf{} : *d_weight;
      *kept = p.drop_below ? load(at.dropout + pair) : splat(1.0f);
      *d_weight = *d_weight * *kept;
    };
    vf whole, d_weight, kept, p_dp_rowsum = load(rows.p_dp_rowsum(p) + n);
    const int64_t last = at.high * BLOCK_M;
    if (rows.alone) {
      // All keys are here: the sums need no rounded output, and the weights no lse.
      vf sum = vf{}, all = vf{};
      for (int64_t pair = first + n; pair < last; pair += BLOCK_M) {
        pair_terms(pair, &whole, &d_weight, &kept);
        all = all + whole;
        sum = sum + whole * d_weight;
        store(s + pair, whole);
        store(d + pair, d_weight);
      }
      const vf norm = all > 0.0f ? 1.0f / all : splat(1.0f), part = norm * share;
      p_dp_rowsum = p_dp_rowsum + sum * norm;
      const vf shift = load(rows.d_lse + n) - share * share * (sum * norm);
      for (int64_t pair = first + n; pair < last; pair += BLOCK_M) {
        whole = load(s + pair);
        store(d + pair, whole * norm * (load(d + pair) * share + shift));
        store(s + pair, p.drop_below ? whole * part * load(at.dropout + pair) : whole * part);
      }
    } else {
      const vf shift = load(rows.shift + n);
      for (int64_t pair = first + n; pair < last; pair += BLOCK_M) {
        pair_terms(pair, &whole, &d_weight, &kept);
        p_dp_rowsum = p_dp_rowsum + whole * d_weight;
        store(s + pair, whole * share * kept);
        store(d + pair, whole * (d_weight * share + shift));
      }
    }
    store(rows.p_dp_rowsum(p) + n, p_dp_rowsum);
  }
  return cleaned;
}

}  // namespace fastattn::FASTATTN_ISA
