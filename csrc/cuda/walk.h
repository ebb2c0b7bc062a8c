// The walk: which program computes which tile of queries, and which tiles of keys that tile visits, in which order.
//
// One warp works it out and tells the others. Tiles of keys go from the last to the first; those in which the mask
// hides something, or the problem ends, are checked, the others are not. Heavy tiles of queries go first.
#pragma once

#include "../common/mask.h"
#include "args.h"
#include "tiles.h"

namespace fastattn::cuda {

// A tile of queries: `heads` query heads of one key head from `head` on, tile_rows queries each from q_first on.
struct Place {
  int32_t batch, head, heads, kv_head, q_first, split;
};

// The steps of a tile, begin <= n < end, and the tile of keys that each visits.
struct Steps {
  int32_t begin, end;
  int32_t count, last[2];  // tile of step n: last[0] - n for the first `count`, then last[1] - (n - count)
  int32_t cut[2][2];       // tiles from, up to, that an interval touches
  int32_t full[2][2];      // that it covers: they need no check
  int32_t checked;         // lists: the first so many are checked
  const int32_t* listed;   // or null
  int32_t number[3];       // of an interval's columns, while it is looked at
};

// What the loading warp tells the others: a tile of queries, how many tiles of keys it visits, which come with theirs.
struct Job {
  Place place;
  int32_t steps;
  int32_t there;  // 0: no more jobs
};

// What it says with each tile of keys: its number, twice, plus 1 where it needs a check.
DEVICE int32_t pack_note(int32_t tile, bool check) { return 2 * tile + check; }
DEVICE int32_t tile_of(int32_t note) { return note >> 1; }
DEVICE bool checks(int32_t note) { return note & 1; }

DEVICE int32_t key_tile(const Steps& steps, int32_t n) {
  if (steps.listed) return steps.listed[n];
  return n < steps.count ? steps.last[0] - n : steps.last[1] - (n - steps.count);
}

DEVICE bool needs_check(const Steps& steps, int32_t n, int32_t tile) {
  if (steps.listed) return n < steps.checked;
  return !((tile >= steps.full[0][0] && tile < steps.full[0][1]) ||
           (tile >= steps.full[1][0] && tile < steps.full[1][1]));
}

// A block's program after `program`. Equal tiles forth and back over the blocks; others to who is ready, by a counter,
// or, without one, to nobody: there are no more than blocks.
template <KernelVariant VARIANT>
DEVICE int32_t next_program(const ForwardArgs& a, int32_t program, int32_t round) {
  if (VARIANT == kPlain) return program + (round & 1 ? 2 * blockIdx.x + 1 : 2 * (a.blocks - blockIdx.x) - 1);
  return a.taken ? a.blocks + atomicAdd(a.taken, 1) : a.programs;
}

// Splits of a tile run side by side, then the units of an L2 group, then its tiles, then the groups.
template <int BLOCK_M>
DEVICE Place place_of(const ForwardArgs& a, int32_t program) {
  Place place;
  place.split = program % a.splits;
  program /= a.splits;
  const int32_t first = program / (a.l2_group * a.q_tiles) * a.l2_group;
  const int32_t left = a.batch * a.num_kv_heads * a.unit_heads - first, width = a.l2_group < left ? a.l2_group : left;
  const int32_t rest = program - first * a.q_tiles, unit = first + rest % width;
  place.q_first = (a.q_tiles - 1 - rest / width) * BLOCK_M;  // the last tiles first: under a causal mask they see most
  place.kv_head = unit / a.unit_heads % a.num_kv_heads;
  place.batch = unit / a.unit_heads / a.num_kv_heads;
  const int32_t within = unit % a.unit_heads * a.tile_heads;
  place.head = place.kv_head * a.group + within;
  place.heads = a.tile_heads < a.group - within ? a.tile_heads : a.group - within;
  return place;
}

DEVICE int32_t clamp(int32_t x, int32_t high) { return x < 0 ? 0 : x < high ? x : high; }

// What a column says of a batch item, no farther from 0 than kUnbounded; of no column `otherwise`.
DEVICE int32_t number_of(const Numbers& column, int32_t batch, int32_t otherwise) {
  if (!column.data) return otherwise;
  const int32_t* at = reinterpret_cast<const int32_t*>(column.data + static_cast<int64_t>(batch) * column.step);
  int32_t number = at[0];
  if (column.wide && at[1] != number >> 31) number = at[1] < 0 ? -kUnbounded : kUnbounded;
  return max(-kUnbounded, min(kUnbounded, number));
}

DEVICE int32_t number_of(const Interval& of, int n, int32_t batch) {
  return number_of(of.column[n], batch, n == 2 ? kUnbounded : 0);
}

// The keys that one query sees through a band, x the first, y the one after the last; `number` is what its columns say.
// An end that is open stays so.
DEVICE int2 keys_of_band(const Interval& of, const int32_t (&number)[3], int32_t q_idx, int32_t kv_len) {
  const int32_t low = of.low > -kUnbounded ? of.low + number[0] : of.low,
                high = of.high < kUnbounded ? of.high + number[0] : of.high;
  return make_int2(max(clamp(q_idx + low, kv_len), min(number[1], kv_len)),
                   min(clamp(q_idx + high, kv_len), number[2]));
}

// The same through any interval.
DEVICE int2 keys_of(const ForwardArgs& a, const Interval& of, int32_t batch, int32_t head, int32_t q_idx) {
  if (!of.start) {
    const int32_t number[3] = {number_of(of, 0, batch), number_of(of, 1, batch), number_of(of, 2, batch)};
    return keys_of_band(of, number, q_idx, a.kv_len);
  }
  const int64_t at = batch * of.stride[0] + head * of.stride[1] + q_idx * of.stride[2];
  return make_int2(of.start[at], of.stop[at]);
}

// A row of a tile: which head, counted from the tile's first, and which query.
DEVICE int2 row_of(const ForwardArgs& a, const Place& place, int32_t row) {
  const int32_t head = a.tile_heads == 1 ? 0 : row / a.tile_rows;
  return make_int2(head, place.q_first + row - head * a.tile_rows);
}

DEVICE bool is_row(const ForwardArgs& a, const Place& place, int2 row) {
  return row.x < place.heads && row.y < a.q_len;
}

// What the rows of a tile see through one interval. Called by a whole warp, which keeps the columns' numbers in shared
// memory.
DEVICE SpanOf<int32_t> tile_span(const ForwardArgs& a, const Interval& of, const Place& place, int32_t (&number)[3]) {
  const int32_t left = a.q_len - place.q_first, queries = left < a.tile_rows ? left : a.tile_rows;
  if (!of.start) {  // both ends rise with the query
#pragma unroll 1
    for (int n = 0; n < 3; ++n)
      if (threadIdx.x % arch::kWarp == 0) number[n] = number_of(of, n, place.batch);
    __syncwarp();
    const int2 first = keys_of_band(of, number, place.q_first, a.kv_len);
    const int2 last = keys_of_band(of, number, place.q_first + queries - 1, a.kv_len);
    __syncwarp();
    return {first.x, last.y, last.x, first.y};
  }
  SpanOf<int32_t> span = {INT32_MAX, INT32_MIN, INT32_MIN, INT32_MAX};
  const int32_t heads = of.stride[1] != 0 ? place.heads : 1;  // else one head stands for all
#pragma unroll 1
  for (int32_t head = 0; head < heads; ++head) {
#pragma unroll 1
    for (int32_t n = threadIdx.x % arch::kWarp; n < queries; n += arch::kWarp) {
      const int2 keys = keys_of(a, of, place.batch, place.head + head, place.q_first + n);
      add_interval(span, keys.x, keys.y);
    }
  }
#pragma unroll 1
  for (int lane = 1; lane < arch::kWarp; lane *= 2) {
    span.lo = min(span.lo, __shfl_xor_sync(~0u, span.lo, lane));
    span.hi = max(span.hi, __shfl_xor_sync(~0u, span.hi, lane));
    span.full_lo = max(span.full_lo, __shfl_xor_sync(~0u, span.full_lo, lane));
    span.full_hi = min(span.full_hi, __shfl_xor_sync(~0u, span.full_hi, lane));
  }
  return span;
}

// The steps of a tile, written to shared memory piece by piece: the loading warp, all of which calls, has few
// registers.
template <int BLOCK_N, KernelVariant VARIANT>
DEVICE void note_steps(const ForwardArgs& a, const Place& place, Steps& steps) {
  const bool leads = threadIdx.x % arch::kWarp == 0;
  if (leads) steps.listed = nullptr;
  if (VARIANT == kGeneral && a.listed) {
    const int64_t tile = place.q_first / a.tile_rows;
    const int64_t row = place.batch * a.lists.count_stride[0] + place.head * a.lists.count_stride[1];
    const int32_t* counts = a.lists.counts + row;
    if (leads) {
      steps.checked = counts[tile];
      steps.end = steps.checked + counts[tile + a.lists.to_full];
      steps.listed = a.lists.tiles + place.batch * a.lists.tile_stride[0] + place.head * a.lists.tile_stride[1] +
                     tile * a.lists.row;
    }
  } else {
#pragma unroll 1
    for (int term = 0; term < 2; ++term) {
      SpanOf<int32_t> span = {0, 0, 0, 0};
      if (VARIANT == kPlain && term == 0) span = {0, a.kv_len, 0, a.kv_len};
      if (VARIANT != kPlain && term < a.terms) span = tile_span(a, a.interval[term], place, steps.number);
      if (leads) {
        const bool empty = span.lo >= span.hi;
        steps.cut[term][0] = empty ? 0 : span.lo / BLOCK_N;
        steps.cut[term][1] = empty ? 0 : (span.hi + BLOCK_N - 1) / BLOCK_N;
        steps.full[term][0] = (max(span.full_lo, 0) + BLOCK_N - 1) / BLOCK_N;
        steps.full[term][1] = max(min(span.full_hi, a.kv_len), 0) / BLOCK_N;
      }
    }
    if (leads) {
      const int later = steps.cut[1][0] >= steps.cut[0][0];
      // Of the later interval, what it has beyond the earlier one.
      const int32_t high = steps.cut[1 - later][1], beyond = max(steps.cut[later][0], high);
      const int32_t last = max(steps.cut[later][1], beyond);
      steps.count = last - beyond;
      steps.last[0] = last - 1;
      steps.last[1] = high - 1;
      steps.end = steps.count + high - steps.cut[1 - later][0];
    }
  }
  if (leads) {
    const int64_t all = steps.end;
    steps.begin = static_cast<int32_t>(all * place.split / a.splits);
    steps.end = static_cast<int32_t>(all * (place.split + 1) / a.splits);
  }
  __syncwarp();
}

}  // namespace fastattn::cuda
