// Primitives of masks that the C++ backends share: intervals as bits, ids, spans and classes of tiles, and how & and |
// join them. Windows in closed form are in csrc/cuda (walk.h, scores.h); the CPU backend gets intervals from Python
// (fastattn/masks/program.py).
//
// What a query sees of the 64 keys of a tile is one word, a bit a key. What a tile of queries sees through a term is a
// Span, and of a tile of keys a TileClass; both join through the program as the bits do.
#pragma once

#include "params.h"

#ifdef __CUDACC__
#define FASTATTN_ANYWHERE __host__ __device__
#else
#define FASTATTN_ANYWHERE
#endif

namespace fastattn {

constexpr int64_t kTileKeys = 64;

// Bits of the keys [start, stop) in the tile that starts at `first`.
static inline uint64_t interval_bits(int64_t start, int64_t stop, int64_t first) {
  const int64_t from = start - first, to = stop - first;
  const int64_t lo = from < 0 ? 0 : from > kTileKeys ? kTileKeys : from;
  const int64_t hi = to < 0 ? 0 : to > kTileKeys ? kTileKeys : to;
  return hi > lo ? ~uint64_t{0} >> (kTileKeys - (hi - lo)) << lo : 0;
}

// Equal ids see each other; a negative id sees nothing and is not seen.
FASTATTN_ANYWHERE static inline bool keep_ids(int64_t q_id, int64_t kv_id) { return q_id == kv_id && q_id >= 0; }

enum TileClass : uint8_t { kSkip = 0, kCheck = 1, kFull = 2 };

static inline TileClass join_classes(TileClass a, TileClass b, int32_t word) {
  return word == kAnd ? (a < b ? a : b) : (a > b ? a : b);
}

// What a tile of queries sees through one term: some of them [lo, hi), all of them [full_lo, full_hi).
template <class Int>
struct SpanOf {
  using Number = Int;
  Int lo, hi, full_lo, full_hi;
};
using Span = SpanOf<int64_t>;

static inline Span empty_span() { return {INT64_MAX, INT64_MIN, INT64_MIN, INT64_MAX}; }

template <class Int>
FASTATTN_ANYWHERE static inline void add_interval(SpanOf<Int>& span, typename SpanOf<Int>::Number start,
                                                  typename SpanOf<Int>::Number stop) {
  if (start < stop) {
    span.lo = start < span.lo ? start : span.lo;
    span.hi = stop > span.hi ? stop : span.hi;
  }
  span.full_lo = start > span.full_lo ? start : span.full_lo;
  span.full_hi = stop < span.full_hi ? stop : span.full_hi;
}

static inline TileClass span_class(const Span& span, int64_t first) {
  const int64_t last = first + kTileKeys;
  if (span.full_lo <= first && last <= span.full_hi) return kFull;
  return span.lo < last && span.hi > first ? kCheck : kSkip;
}

}  // namespace fastattn
