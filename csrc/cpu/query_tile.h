// BLOCK_M queries, one a lane: who they are, what they see, and which tiles of keys that makes them visit.
#pragma once

#include "../common/mask.h"
#include "pack.h"

namespace fastattn::FASTATTN_ISA {

static_assert(BLOCK_N == kTileKeys, "what a query sees of a tile of keys is one word");

// Query rows that share keys: one head's, or, where there are few, those of all heads of a group one after another.
struct Unit {
  int64_t b, kv_head, head, heads;

  static bool folds_group(const Params& p) { return p.group > 1 && p.q_len < BLOCK_M; }
  static int64_t count(const Params& p) { return p.batch * (folds_group(p) ? p.num_kv_heads : p.num_heads); }
  static int64_t rows(const Params& p) { return folds_group(p) ? p.group * p.q_len : p.q_len; }
  static int64_t tiles(const Params& p) { return (rows(p) + BLOCK_M - 1) / BLOCK_M; }

  static Unit at(const Params& p, int64_t index) {
    const int64_t heads = folds_group(p) ? p.group : 1, per_batch = p.num_heads / heads;
    const int64_t head = index % per_batch * heads;
    return {index / per_batch, head / p.group, head, heads};
  }
};

struct QueryTile {
  const Params* p;
  int64_t b;
  int count, vectors;  // lanes in use, and vectors that hold them
  int32_t head[BLOCK_M], q_idx[BLOCK_M];
  Span span[kMostTerms];  // of the terms; span[0] alone where there is no mask

  // Rows from `first` on of the `heads` heads from `first_head` on, q_len each.
  void place(const Params& params, int64_t batch, int64_t first_head, int64_t heads, int64_t first) {
    start(params, batch, heads * params.q_len - first);
    for (int lane = 0; lane < BLOCK_M; ++lane) {
      const int64_t row = first + (lane < count ? lane : 0);
      head[lane] = static_cast<int32_t>(first_head + row / p->q_len);
      q_idx[lane] = static_cast<int32_t>(row % p->q_len);
    }
    read_spans();
  }

  // Rows of one head: `rows` from `first` on, of `all`; null: as they come.
  void pick(const Params& params, int64_t batch, int64_t of_head, const int64_t* rows, int64_t first, int64_t all) {
    start(params, batch, all - first);
    for (int lane = 0; lane < BLOCK_M; ++lane) {
      const int64_t row = first + (lane < count ? lane : 0);
      head[lane] = static_cast<int32_t>(of_head);
      q_idx[lane] = static_cast<int32_t>(rows ? rows[row] : row);
    }
    read_spans();
  }

  // Tiles of keys that may hold something visible lie in [first, last).
  void tiles(int64_t* first, int64_t* last) const {
    int64_t lo[kMostTerms + 1], hi[kMostTerms + 1];
    int top = 0;
    lo[0] = 0;
    hi[0] = p->kv_len;
    for (int w = 0; w < p->mask.words; ++w) {
      const int32_t word = p->mask.word[w];
      if (word >= 0) {
        const bool empty = span[word].lo >= span[word].hi;
        lo[top] = empty ? 0 : span[word].lo;
        hi[top++] = empty ? 0 : span[word].hi;
        continue;
      }
      --top;
      const int64_t lo_a = lo[top - 1], hi_a = hi[top - 1], lo_b = lo[top], hi_b = hi[top];
      if (word == kAnd) {
        lo[top - 1] = lo_a > lo_b ? lo_a : lo_b;
        hi[top - 1] = hi_a < hi_b ? hi_a : hi_b;
      } else if (lo_a >= hi_a || lo_b >= hi_b) {
        lo[top - 1] = lo_a < hi_a ? lo_a : lo_b;
        hi[top - 1] = lo_a < hi_a ? hi_a : hi_b;
      } else {
        lo[top - 1] = lo_a < lo_b ? lo_a : lo_b;
        hi[top - 1] = hi_a > hi_b ? hi_a : hi_b;
      }
    }
    *first = lo[0] / BLOCK_N;
    *last = hi[0] > lo[0] ? (hi[0] + BLOCK_N - 1) / BLOCK_N : *first;
  }

  // From spans alone: kCheck where only the bits can tell.
  TileClass tile_class(int64_t kv_tile) const {
    const int64_t first = kv_tile * BLOCK_N;
    if (p->mask.words == 0) return span_class(span[0], first);
    TileClass stack[kMostTerms + 1];
    int top = 0;
    for (int w = 0; w < p->mask.words; ++w) {
      const int32_t word = p->mask.word[w];
      if (word >= 0) {
        stack[top++] = term_class(p->mask.term[word], span[word], first);
      } else {
        --top;
        stack[top - 1] = join_classes(stack[top - 1], stack[top], word);
      }
    }
    return stack[0];
  }

  // What every lane sees of a tile of keys, nothing in lanes out of use, and what any does. Gives the tile's class.
  TileClass see(int64_t kv_tile, uint64_t* bits, uint64_t* some) const {
    const int64_t first = kv_tile * BLOCK_N;
    uint64_t stack[kMostTerms + 1][BLOCK_M];
    int top = 0;
    for (int w = 0; w < p->mask.words; ++w) {
      const int32_t word = p->mask.word[w];
      if (word >= 0) {
        term_bits(p->mask.term[word], first, stack[top++]);
        continue;
      }
      --top;
      for (int lane = 0; lane < BLOCK_M; ++lane) {
        const uint64_t a = stack[top - 1][lane], c = stack[top][lane];
        stack[top - 1][lane] = word == kAnd ? a & c : a | c;
      }
    }
    const uint64_t inside = interval_bits(0, p->kv_len, first);
    uint64_t any_bits = 0, all_bits = ~uint64_t{0};
    for (int lane = 0; lane < BLOCK_M; ++lane) {
      const uint64_t seen = p->mask.words ? stack[0][lane] & inside : inside;
      bits[lane] = lane < count ? seen : 0;
      any_bits |= bits[lane];
      if (lane < count) all_bits &= seen;
    }
    *some = any_bits;
    return !any_bits ? kSkip : ~all_bits ? kCheck : kFull;
  }

 private:
  void start(const Params& params, int64_t batch, int64_t left) {
    p = &params;
    b = batch;
    count = static_cast<int>(left < BLOCK_M ? left : BLOCK_M);
    vectors = static_cast<int>(round_up((count + VL - 1) / VL, VECTOR_STEP));
  }

  void read_spans() {
    span[0] = {0, p->kv_len, 0, p->kv_len};
    for (int n = 0; n < p->mask.terms; ++n) span[n] = term_span(p->mask.term[n]);
  }

  int64_t interval_at(const MaskTerm& term, int lane) const {
    return b * term.stride[0] + head[lane] * term.stride[1] + q_idx[lane] * term.stride[2];
  }

  Span term_span(const MaskTerm& term) const {
    if (term.kind == kElements) return {0, p->kv_len, INT64_MAX, INT64_MIN};
    if (term.kind == kInterval) {
      Span found = empty_span();
      for (int lane = 0; lane < count; ++lane)
        add_interval(found, term.start[interval_at(term, lane)], term.stop[interval_at(term, lane)]);
      return found;
    }
    // Ids: the range of those that may be seen in full_lo ... full_hi; all keys may be met.
    Span found = {0, p->kv_len, INT64_MAX, -1};
    bool seeing = false;
    for (int lane = 0; lane < count; ++lane) {
      const int64_t id = term.q_ids[interval_at(term, lane)];
      if (id < found.full_lo) found.full_lo = id;
      if (id > found.full_hi) found.full_hi = id;
      seeing |= id >= 0;
    }
    if (!seeing) found.hi = 0;
    return found;
  }

  TileClass term_class(const MaskTerm& term, const Span& found, int64_t first) const {
    if (term.kind == kInterval) return span_class(found, first);
    if (term.kind == kElements || found.hi == 0) return found.hi == 0 ? kSkip : kCheck;
    int64_t lo = INT64_MAX, hi = -1;
    const int64_t last = first + BLOCK_N < p->kv_len ? first + BLOCK_N : p->kv_len;
    for (int64_t j = first; j < last; ++j) {
      const int64_t id = term.kv_ids[b * term.kv_id_stride[0] + j * term.kv_id_stride[1]];
      if (id < lo) lo = id;
      if (id > hi) hi = id;
    }
    if (hi < 0 || hi < found.full_lo || lo > found.full_hi) return kSkip;
    const bool one = lo == hi && found.full_lo == lo && found.full_hi == lo && last - first == BLOCK_N;
    return one ? kFull : kCheck;
  }

  void term_bits(const MaskTerm& term, int64_t first, uint64_t* bits) const {
    const int64_t left = p->kv_len - first;
    const int keys = static_cast<int>(left < BLOCK_N ? left : BLOCK_N);
    int64_t kv_ids[BLOCK_N];
    if (term.kind == kIds)
      for (int j = 0; j < keys; ++j)
        kv_ids[j] = term.kv_ids[b * term.kv_id_stride[0] + (first + j) * term.kv_id_stride[1]];
    for (int lane = 0; lane < BLOCK_M; ++lane) {
      const int64_t at = interval_at(term, lane);
      if (term.kind == kInterval) {
        bits[lane] = interval_bits(term.start[at], term.stop[at], first);
        continue;
      }
      alignas(64) uint8_t seen[BLOCK_N] = {};
      if (term.kind == kIds) {
        const int64_t id = term.q_ids[at];
        if (lane && id == term.q_ids[interval_at(term, lane - 1)]) {
          bits[lane] = bits[lane - 1];
          continue;
        }
        for (int j = 0; j < keys; ++j) seen[j] = keep_ids(id, kv_ids[j]);
      } else {
        if (lane && at == interval_at(term, lane - 1)) {
          bits[lane] = bits[lane - 1];
          continue;
        }
        const uint8_t* from = term.elements + at + first * term.stride[3];
        if (term.stride[3] == 1)
          std::memcpy(seen, from, keys);
        else
          for (int j = 0; j < keys; ++j) seen[j] = from[j * term.stride[3]];
      }
      bits[lane] = gather_bits(seen);
    }
  }

  // 64 bytes to bits, 1 where a byte is not 0, eight at a time: a sum and its byte's top bit tell whether one is 0, and
  // the product moves byte n's bit to bit 56 + n.
  static uint64_t gather_bits(const uint8_t* bytes) {
    uint64_t bits = 0;
    for (int n = 0; n < 8; ++n) {
      const uint64_t word = load<uint64_t>(bytes + 8 * n), low_bits = uint64_t{0x7f7f7f7f7f7f7f7f};
      const uint64_t ones = (((word & low_bits) + low_bits) | word) >> 7 & uint64_t{0x0101010101010101};
      bits |= (ones * uint64_t{0x0102040810204080} >> 56) << (8 * n);
    }
    return bits;
  }
};

}  // namespace fastattn::FASTATTN_ISA
