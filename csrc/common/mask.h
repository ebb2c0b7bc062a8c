// The mask's rules: which keys a query sees, and from that which tiles of keys a tile of queries visits.
#pragma once

#include "params.h"

namespace fastattn {

// Whether a query with the interval [start, stop) sees the key.
static inline bool keep_interval(int64_t kv_idx, int64_t start, int64_t stop) {
  return kv_idx >= start && kv_idx < stop;
}

// Equal ids see each other; a negative id sees nothing and is not seen.
static inline bool keep_ids(int64_t q_id, int64_t kv_id) { return q_id == kv_id && q_id >= 0; }

enum TileClass : uint8_t { kSkip = 0, kCheck = 1, kFull = 2 };

// What a tile of queries sees through one interval each: some of them [lo, hi), all of them [full_lo, full_hi).
struct Span {
  int64_t lo = INT64_MAX, hi = INT64_MIN;
  int64_t full_lo = INT64_MIN, full_hi = INT64_MAX;

  void add(int64_t start, int64_t stop) {
    if (start < stop) {
      lo = start < lo ? start : lo;
      hi = stop > hi ? stop : hi;
    }
    full_lo = start > full_lo ? start : full_lo;
    full_hi = stop < full_hi ? stop : full_hi;
  }
  bool touches(int64_t first, int64_t last) const { return lo < last && hi > first; }
  bool covers(int64_t first, int64_t last) const { return full_lo <= first && last <= full_hi; }
};

}  // namespace fastattn
