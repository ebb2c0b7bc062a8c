// Forward for a few query rows against many keys, as in decoding: memory is what it costs, so keys and values are read
// once, where they lie, and lanes are head dimensions in both products. Scores are still [keys][queries].
#pragma once

#include "decode_half.h"

namespace fastattn::FASTATTN_ISA {

// Not where a backward follows, which has lse_low: it sums scores as tiles do, and beside large ones another order of
// the sums would be seen in its weights.
INLINE bool is_decode(const Params& p) {
  const bool in_one_block = !p.key.blocks || p.key.block_size % BLOCK_N == 0;
  return Unit::rows(p) <= MOST_ROWS && !p.lse_low && p.key.stride[3] == 1 && p.value.stride[3] == 1 &&
         p.head_dim % VL == 0 && p.head_dim_v % VL == 0 && in_one_block;
}

// sum[j][r] = sum over d of key[j][d] * query[r][d], lanes not added up.
template <class Read, int ROWS, int KEYS>
INLINE void decode_sums(const char* key, int64_t key_bytes, int64_t dim, const float* query, int64_t width,
                        vf (&sum)[KEYS][ROWS]) {
  for (int64_t d = 0; d < dim; d += VL) {
    vf row[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) row[r] = load(query + r * width + d);
#pragma GCC unroll 16
    for (int j = 0; j < KEYS; ++j) {
      const vf line = Read::read(key + j * key_bytes + d * Read::BYTES);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sum[j][r] = sum[j][r] + line * row[r];
    }
  }
}

// out[r][d] += sum over j of weights[j][r] * value[j][d], for VECTORS vectors of d and the keys with a bit in `seen`;
// weights [BLOCK_N][ROWS]. `ahead` is how much of a later row to fetch.
template <class Read, int ROWS, int VECTORS>
INLINE void decode_output(const char* value, int64_t value_bytes, uint64_t seen, const float* weights, float* out,
                          int64_t width, int64_t ahead) {
  vf sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = load(out + r * width + v * VL);
  for (int j = 0; seen; ++j, seen >>= 1) {
    if (!(seen & 1)) continue;
    fetch(value + (j + AHEAD) * value_bytes, ahead);
    vf line[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) line[v] = Read::read(value + j * value_bytes + v * VL * Read::BYTES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = sum[r][v] + line[v] * weights[j * ROWS + r];
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) store(out + r * width + v * VL, sum[r][v]);
}

struct DecodeWork {
  QueryTile* tile;
  TilePair at;
  float *s, *lanes;  // [BLOCK_N][MOST_ROWS] side by side, [BLOCK_N][BLOCK_M]
  float* query;      // [MOST_ROWS][width]
  float* state;      // a RowState
  uint16_t* half;    // `query` in bfloat16
  uint32_t* words;   // [BLOCK_N / 2][MOST_ROWS]

  bool take(const Params& p, Scratch& from) {
    const int64_t numbers = BLOCK_N * MOST_ROWS, size = RowState::size(p);
    const int64_t queries = MOST_ROWS * padded(p.head_dim);
    if (!from.reset(Scratch::bytes_for<QueryTile>(1) + TilePair::bytes() + 2 * Scratch::bytes_for<float>(numbers) +
                    Scratch::bytes_for<float>(TILE) + 2 * Scratch::bytes_for<float>(queries) +
                    Scratch::bytes_for<float>(size)))
      return false;
    tile = from.take<QueryTile>(1);
    query = from.take<float>(queries);
    at.take(from);
    s = from.take<float>(numbers);
    lanes = from.take<float>(TILE);
    state = from.take<float>(size);
    half = from.take<uint16_t>(queries);
    words = from.take<uint32_t>(numbers);
    std::memset(query, 0, queries * sizeof(float));
    std::memset(s, 0, numbers * sizeof(float));
    std::memset(lanes, 0, TILE * sizeof(float));
    RowState(state).clear(p);
    return true;
  }
};

template <class Read>
constexpr bool IS_PAIRED = false;
#if defined(__AVX512BF16__)
template <>
constexpr bool IS_PAIRED<ReadBFloat16Pairs> = true;
#endif

// Scores of KEYS keys.
template <class Read, int ROWS, int KEYS>
INLINE void decode_scores(const Params& p, const char* key, int64_t key_bytes, DecodeWork& work, float* scores) {
  constexpr int SUMS = KEYS * ROWS, WHOLE = SUMS > VL ? SUMS : VL;
  vf sum[WHOLE] = {};
  auto& pairs = reinterpret_cast<vf(&)[KEYS][ROWS]>(sum);
  for (int j = 0; j < KEYS; ++j) fetch(key + (j + AHEAD) * key_bytes, p.head_dim * Read::BYTES);
#if defined(__AVX512BF16__)
  if constexpr (IS_PAIRED<Read>)
    paired_sums<ROWS, KEYS>(key, key_bytes, p.head_dim, work.half, padded(p.head_dim), pairs);
  else
#endif
    decode_sums<Read, ROWS, KEYS>(key, key_bytes, p.head_dim, work.query, padded(p.head_dim), pairs);
#pragma GCC unroll 4
  for (int at = 0; at < SUMS; at += VL) {
    const vf found = totals(sum + at);
    std::memcpy(scores + at, &found, (SUMS < VL ? SUMS : VL) * sizeof(float));
  }
}

template <class Read, int ROWS>
INLINE void decode_tile_scores(const Params& p, const char* key, int64_t key_bytes, int64_t count, DecodeWork& work) {
  constexpr int KEYS = VL > ROWS ? VL / ROWS : 1;
  int64_t j = 0;
  for (; j + KEYS <= count; j += KEYS)
    decode_scores<Read, ROWS, KEYS>(p, key + j * key_bytes, key_bytes, work, work.s + j * ROWS);
  for (; j < count; ++j) decode_scores<Read, ROWS, 1>(p, key + j * key_bytes, key_bytes, work, work.s + j * ROWS);
}

template <class Read, int ROWS>
INLINE void decode_tile_output(const Params& p, const char* value, int64_t value_bytes, uint64_t seen,
                               DecodeWork& work) {
  const int64_t width = padded(p.head_dim_v), bytes = p.head_dim_v * Read::BYTES;
  float* out = RowState(work.state).out;
  int64_t d = 0;
#if defined(__AVX512BF16__)
  if constexpr (IS_PAIRED<Read>) {
    constexpr int VECTORS = ROWS > 4 ? 1 : 2;
    row_pairs<ROWS>(work.s, work.words);
    for (; d + VECTORS * PAIRED <= p.head_dim_v; d += VECTORS * PAIRED)
      paired_output<ROWS, VECTORS>(value + d * 2, value_bytes, seen, work.words, out + d, width, d ? 0 : bytes);
    for (; d < p.head_dim_v; d += PAIRED)
      paired_output<ROWS, 1>(value + d * 2, value_bytes, seen, work.words, out + d, width, 0);
  } else
#endif
  {
    constexpr int VECTORS = ROWS > 4 ? 2 : 4;
    for (; d + VECTORS * VL <= p.head_dim_v; d += VECTORS * VL)
      decode_output<Read, ROWS, VECTORS>(value + d * Read::BYTES, value_bytes, seen, work.s, out + d, width,
                                         d ? 0 : bytes);
    for (; d < p.head_dim_v; d += VL)
      decode_output<Read, ROWS, 1>(value + d * Read::BYTES, value_bytes, seen, work.s, out + d, width, 0);
  }
}

// One tile of keys.
template <class Read, int ROWS>
static void decode_step(const Params& p, int64_t kv_head, DecodeWork& work) {
  const QueryTile& tile = *work.tile;
  const TilePair& at = work.at;
  const int64_t left = p.kv_len - at.first, count = left < BLOCK_N ? left : BLOCK_N;
  const char* key = row_at(p.key, tile.b, kv_head, at.first);
  const char* value = row_at(p.value, tile.b, kv_head, at.first);
  RowState state(work.state);
  uint64_t seen = ~uint64_t{0};
  decode_tile_scores<Read, ROWS>(p, key, p.key.stride[2] * Read::BYTES, count, work);
  if (!at.plain) {
    to_lanes<ROWS>(work.s, work.lanes);
    finish_scores(p, tile, at, work.lanes, nullptr);
    seen = at.seen(work.lanes, tile.vectors);
    from_lanes<ROWS>(work.lanes, work.s);
  }
  online_softmax_step_rows<ROWS>(work.s, to_power(p), state, padded(p.head_dim_v));
  if (p.drop_below) {
    dropout_factors(p, tile, at.first, at.low, at.high, at.dropout);
    to_lanes<ROWS>(work.s, work.lanes);
    multiply(at, work.lanes, at.dropout);
    from_lanes<ROWS>(work.lanes, work.s);
  }
  decode_tile_output<Read, ROWS>(p, value, p.value.stride[2] * Read::BYTES, seen, work);
}

using DecodeStep = void (*)(const Params&, int64_t, DecodeWork&);

template <class Read>
static DecodeStep decode_step_for(int rows) {
  return rows > 4   ? decode_step<Read, 8>
         : rows > 2 ? decode_step<Read, 4>
         : rows > 1 ? decode_step<Read, 2>
                    : decode_step<Read, 1>;
}

// out and lse of a finished unit.
static void finish_rows(const Params& p, const QueryTile& tile, const RowState& state) {
  const int64_t width = padded(p.head_dim_v);
  const float* row = state.out;
  constexpr int WHOLE = MOST_ROWS > VL ? MOST_ROWS : VL;
  alignas(64) float max[WHOLE] = {}, sum[WHOLE] = {}, factor[WHOLE];
  std::memcpy(max, state.max, tile.count * sizeof(float));
  std::memcpy(sum, state.sum, tile.count * sizeof(float));
  finish_lanes(p, tile, max, sum, factor);
  for (int lane = 0; lane < tile.count; ++lane, row += width) {
    state.scale(lane, factor[lane], width);
    write_row(p.out, tile.b, tile.head[lane], tile.q_idx[lane], 0, p.head_dim_v, row);
  }
}

// Pairs of rows leave their products in an order of their own (paired_place).
static void sort_pairs(RowState state, int rows, int64_t width, int64_t dim) {
  float sorted[PAIRED];
  for (int r = 0; r < rows; ++r)
    for (int64_t first = r * width; first < r * width + dim; first += PAIRED) {
      for (int d = 0; d < PAIRED; ++d) sorted[d] = state.out[first + paired_place(d)];
      std::memcpy(state.out + first, sorted, sizeof sorted);
    }
}

// The keys of tiles [first, last) for one unit's rows, into `part`, or to out and lse where it is null.
static bool decode_item(const Params& p, int64_t index, int64_t first, int64_t last, float* part, Scratch& scratch) {
  DecodeWork work;
  if (!work.take(p, scratch)) return false;
  const Unit unit = Unit::at(p, index);
  work.tile->place(p, unit.b, unit.head, unit.heads, 0);
  const QueryTile& tile = *work.tile;
  const int64_t width = padded(p.head_dim);
  for (int r = 0; r < tile.count; ++r) {
    const char* row = row_at(p.query, tile.b, tile.head[r], tile.q_idx[r]);
    read_row(p.query, row, p.head_dim, width, work.query + r * width);
  }
  int64_t from, to;
  tile.tiles(&from, &to);
  first = first < from ? from : first;
  last = last > to ? to : last;
  const int count = tile.count;
  DecodeStep step = p.dtype == kFloat32    ? decode_step_for<ReadFloat>(count)
                    : p.dtype == kBFloat16 ? decode_step_for<ReadBFloat16>(count)
                                           : decode_step_for<ReadFloat16>(count);
  bool paired = false;
#if defined(__AVX512BF16__)
  paired = p.dtype == kBFloat16 && p.head_dim % PAIRED == 0 && p.head_dim_v % PAIRED == 0;
  if (paired) {
    step = decode_step_for<ReadBFloat16Pairs>(count);
    for (int64_t d = 0; d < MOST_ROWS * width; d += VL) store(work.half + d, to_bfloat16(load(work.query + d)));
  }
#endif
  for (int64_t kv_tile = first; kv_tile < last; ++kv_tile)
    if (work.at.classify(p, tile, kv_tile)) {
      work.at.look_at_all();
      step(p, unit.kv_head, work);
    }
  const RowState done(work.state);
  if (paired) sort_pairs(done, count, padded(p.head_dim_v), p.head_dim_v);
  if (part)
    std::memcpy(part, work.state, RowState::size(p) * sizeof(float));
  else
    finish_rows(p, tile, done);
  return true;
}

// Join the parts of one unit's rows, in order.
static bool join_decode(const Params& p, int64_t index, int64_t parts, float* part, Scratch& scratch) {
  if (!scratch.reset(Scratch::bytes_for<QueryTile>(1))) return false;
  QueryTile& tile = *scratch.take<QueryTile>(1);
  const Unit unit = Unit::at(p, index);
  tile.place(p, unit.b, unit.head, unit.heads, 0);
  RowState whole(part);
  for (int64_t n = 1; n < parts; ++n)
    whole.join(RowState(part + n * RowState::size(p)), tile.count, to_power(p), padded(p.head_dim_v));
  finish_rows(p, tile, whole);
  return true;
}

}  // namespace fastattn::FASTATTN_ISA
