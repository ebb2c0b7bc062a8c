// Forward for a few query rows against many keys, as in decoding: memory is what it costs, so keys and values are read
// once, where they lie, and lanes are head dimensions in both products. Scores are still [keys][queries].
#pragma once

#include "narrow_half.h"
#include "state.h"

namespace fastattn::FASTATTN_ISA {

constexpr int MOST_ROWS = 8;

INLINE bool is_narrow(const Params& p) {
  const bool in_one_block = !p.key.blocks || p.key.block_size % BLOCK_N == 0;
  return Unit::rows(p) <= MOST_ROWS && p.key.stride[3] == 1 && p.value.stride[3] == 1 && p.head_dim % VL == 0 &&
         p.head_dim_v % VL == 0 && in_one_block;
}

// Sum of the lanes, halves first.
INLINE float total(vf numbers) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)numbers);
#else
  float lanes[VL];
  store(lanes, numbers);
#pragma GCC unroll 8
  for (int half = VL / 2; half; half /= 2)
#pragma GCC unroll 8
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
#endif
}

// scores[j][r] = sum over d of key[j][d] * query[r][d], for KEYS keys.
template <class Read, int ROWS, int KEYS>
INLINE void narrow_scores(const char* key, int64_t key_bytes, int64_t dim, const float* query, int64_t width,
                          float* scores) {
  vf sum[KEYS][ROWS];
#pragma GCC unroll 8
  for (int j = 0; j < KEYS; ++j)
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) sum[j][r] = vf{};
  for (int64_t d = 0; d < dim; d += VL) {
    vf line[KEYS];
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; ++j) line[j] = Read::read(key + j * key_bytes + d * Read::BYTES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const vf row = load(query + r * width + d);
#pragma GCC unroll 8
      for (int j = 0; j < KEYS; ++j) sum[j][r] = sum[j][r] + line[j] * row;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < KEYS; ++j)
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) scores[j * BLOCK_M + r] = total(sum[j][r]);
}

// out[r][d] += sum over j of weights[j][r] * value[j][d], for VECTORS vectors of d and the keys with a bit in `seen`.
// `ahead` is how much of a later row to fetch.
template <class Read, int ROWS, int VECTORS>
INLINE void narrow_output(const char* value, int64_t value_bytes, uint64_t seen, const float* weights, float* out,
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
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = sum[r][v] + line[v] * weights[j * BLOCK_M + r];
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) store(out + r * width + v * VL, sum[r][v]);
}

struct NarrowWork {
  QueryTile* tile;
  QueryRows<FloatDot> query;
  Meeting at;
  float *s, *out, *state;  // [BLOCK_N][BLOCK_M], [MOST_ROWS][width], a State
  uint16_t* half;          // [MOST_ROWS][width], the queries in bfloat16
  uint32_t* words;         // [BLOCK_N / 2][BLOCK_M]

  bool take(const Params& p, Scratch& from) {
    const int64_t size = State::size(p), width = padded(p.head_dim_v);
    if (!from.reset(Scratch::bytes_for<QueryTile>(1) + QueryRows<FloatDot>::bytes(p.head_dim, false) +
                    Meeting::bytes() + 2 * Scratch::bytes_for<float>(TILE) +
                    Scratch::bytes_for<float>(MOST_ROWS * padded(p.head_dim)) +
                    Scratch::bytes_for<float>(MOST_ROWS * width) + Scratch::bytes_for<float>(size)))
      return false;
    tile = from.take<QueryTile>(1);
    query.take(p.head_dim, false, from);
    at.take(from);
    s = from.take<float>(TILE);
    out = from.take<float>(MOST_ROWS * width);
    state = from.take<float>(size);
    half = from.take<uint16_t>(MOST_ROWS * padded(p.head_dim));
    words = from.take<uint32_t>(TILE);
    std::memset(s, 0, TILE * sizeof(float));
    std::memset(out, 0, MOST_ROWS * width * sizeof(float));
    State(state).clear(width);
    return true;
  }
};

// Scores of the tile's keys.
template <class Read, int ROWS>
INLINE void narrow_tile_scores(const Params& p, const char* key, int64_t key_bytes, int64_t count, NarrowWork& work) {
  constexpr int KEYS = ROWS > 4 ? 1 : 2;
  const int64_t width = padded(p.head_dim);
  int64_t j = 0;
  for (; j + KEYS <= count; j += KEYS) {
    for (int n = 0; n < KEYS; ++n) fetch(key + (j + n + AHEAD) * key_bytes, p.head_dim * Read::BYTES);
    narrow_scores<Read, ROWS, KEYS>(key + j * key_bytes, key_bytes, p.head_dim, work.query.rows, width,
                                    work.s + j * BLOCK_M);
  }
  for (; j < count; ++j)
    narrow_scores<Read, ROWS, 1>(key + j * key_bytes, key_bytes, p.head_dim, work.query.rows, width,
                                 work.s + j * BLOCK_M);
}

template <class Read, int ROWS>
INLINE void narrow_tile_output(const Params& p, const char* value, int64_t value_bytes, uint64_t seen,
                               NarrowWork& work) {
  constexpr int VECTORS = ROWS > 4 ? 2 : 4;
  const int64_t width = padded(p.head_dim_v);
  int64_t d = 0;
  for (; d + VECTORS * VL <= p.head_dim_v; d += VECTORS * VL)
    narrow_output<Read, ROWS, VECTORS>(value + d * Read::BYTES, value_bytes, seen, work.s, work.out + d, width,
                                       d ? 0 : p.head_dim_v * Read::BYTES);
  for (; d < p.head_dim_v; d += VL)
    narrow_output<Read, ROWS, 1>(value + d * Read::BYTES, value_bytes, seen, work.s, work.out + d, width, 0);
}

#if defined(__AVX512BF16__)
template <int ROWS>
INLINE void paired_tile_scores(const Params& p, const char* key, int64_t key_bytes, int64_t count, NarrowWork& work) {
  constexpr int KEYS = ROWS > 4 ? 1 : 2;
  const int64_t width = padded(p.head_dim);
  int64_t j = 0;
  for (; j + KEYS <= count; j += KEYS) {
    for (int n = 0; n < KEYS; ++n) fetch(key + (j + n + AHEAD) * key_bytes, p.head_dim * 2);
    paired_scores<ROWS, KEYS>(key + j * key_bytes, key_bytes, p.head_dim, work.half, width, work.s + j * BLOCK_M);
  }
  for (; j < count; ++j)
    paired_scores<ROWS, 1>(key + j * key_bytes, key_bytes, p.head_dim, work.half, width, work.s + j * BLOCK_M);
}

template <int ROWS>
INLINE void paired_tile_output(const Params& p, const char* value, int64_t value_bytes, uint64_t seen,
                               NarrowWork& work) {
  constexpr int VECTORS = ROWS > 4 ? 1 : 2;
  const int64_t width = padded(p.head_dim_v);
  const uint32_t* weights = weight_pairs<BFloat16Dot>(1, BLOCK_N, work.s, work.words);
  int64_t d = 0;
  for (; d + VECTORS * PAIRED <= p.head_dim_v; d += VECTORS * PAIRED)
    paired_output<ROWS, VECTORS>(value + d * 2, value_bytes, seen, weights, work.out + d, width,
                                 d ? 0 : p.head_dim_v * 2);
  for (; d < p.head_dim_v; d += PAIRED)
    paired_output<ROWS, 1>(value + d * 2, value_bytes, seen, weights, work.out + d, width, 0);
}

template <class Read>
constexpr bool IS_PAIRED = false;
template <>
constexpr bool IS_PAIRED<ReadBFloat16Pairs> = true;
#endif

// One tile of keys.
template <class Read, int ROWS>
static void narrow_step(const Params& p, int64_t kv_head, NarrowWork& work) {
  const QueryTile& tile = *work.tile;
  const Meeting& at = work.at;
  const int64_t left = p.kv_len - at.first, count = left < BLOCK_N ? left : BLOCK_N, width = padded(p.head_dim_v);
  const char* key = row_at(p.key, tile.b, kv_head, at.first);
  const char* value = row_at(p.value, tile.b, kv_head, at.first);
  const int64_t key_bytes = p.key.stride[2] * Read::BYTES, value_bytes = p.value.stride[2] * Read::BYTES;
#if defined(__AVX512BF16__)
  if constexpr (IS_PAIRED<Read>)
    paired_tile_scores<ROWS>(p, key, key_bytes, count, work);
  else
#endif
    narrow_tile_scores<Read, ROWS>(p, key, key_bytes, count, work);
  if (!at.plain) finish_scores(p, tile, at, work.s, nullptr);
  const uint64_t seen = at.plain ? ~uint64_t{0} : at.seen(work.s, tile.vectors);
  State state(work.state);
  alignas(64) float before[MOST_ROWS];
  std::memcpy(before, state.max, sizeof before);
  soften(tile.vectors, BLOCK_N, work.s, to_power(p), state, 0);
  for (int r = 0; r < ROWS; ++r) {
    if (before[r] == state.max[r] || before[r] == -kInfinity) continue;
    const float factor = exp2f((before[r] - state.max[r]) * to_power(p));
    for (int64_t d = 0; d < width; d += VL) store(work.out + r * width + d, load(work.out + r * width + d) * factor);
  }
  if (p.drop_below) {
    dropout_factors(p, tile, at.first, at.low, at.high, at.dropout);
    multiply(at, work.s, at.dropout);
  }
#if defined(__AVX512BF16__)
  if constexpr (IS_PAIRED<Read>)
    paired_tile_output<ROWS>(p, value, value_bytes, seen, work);
  else
#endif
    narrow_tile_output<Read, ROWS>(p, value, value_bytes, seen, work);
}

using NarrowStep = void (*)(const Params&, int64_t, NarrowWork&);

template <class Read>
static NarrowStep narrow_step_for(int rows) {
  return rows > 4 ? narrow_step<Read, 8> : rows > 2 ? narrow_step<Read, 4> : rows > 1 ? narrow_step<Read, 2>
                                                                                      : narrow_step<Read, 1>;
}

// The keys of tiles [first, last) for one unit's rows, into `state`.
static bool narrow_item(const Params& p, int64_t index, int64_t first, int64_t last, float* state, Scratch& scratch) {
  NarrowWork work;
  if (!work.take(p, scratch)) return false;
  const Unit unit = Unit::at(p, index);
  const int64_t width = padded(p.head_dim_v);
  work.tile->place(p, unit.b, unit.head, unit.heads, 0);
  work.query.read(p.query, *work.tile, p.head_dim, nullptr);
  int64_t from, to;
  work.tile->tiles(&from, &to);
  first = first < from ? from : first;
  last = last > to ? to : last;
  const int count = work.tile->count;
  NarrowStep step = p.dtype == kFloat32    ? narrow_step_for<ReadFloat>(count)
                    : p.dtype == kBFloat16 ? narrow_step_for<ReadBFloat16>(count)
                                           : narrow_step_for<ReadFloat16>(count);
  bool paired = false;
#if defined(__AVX512BF16__)
  paired = p.dtype == kBFloat16 && p.head_dim % PAIRED == 0 && p.head_dim_v % PAIRED == 0;
  if (paired) {
    step = narrow_step_for<ReadBFloat16Pairs>(count);
    const int64_t all = MOST_ROWS * padded(p.head_dim);
    for (int64_t d = 0; d < all; d += VL) store(work.half + d, to_bfloat16(load(work.query.rows + d)));
  }
#endif
  for (int64_t kv_tile = first; kv_tile < last; ++kv_tile)
    if (work.at.meet(p, *work.tile, kv_tile)) {
      work.at.look_at_all();
      step(p, unit.kv_head, work);
    }
  State done(work.state);
  for (int lane = 0; lane < count; ++lane)
    for (int64_t d = 0; d < p.head_dim_v; ++d)
      done.out[d * BLOCK_M + lane] = work.out[lane * width + (paired ? paired_place(d) : d)];
  if (state)
    std::memcpy(state, work.state, State::size(p) * sizeof(float));
  else
    finish_tile(p, *work.tile, done);
  return true;
}

}  // namespace fastattn::FASTATTN_ISA
