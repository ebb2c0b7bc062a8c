// Which weights are kept: the contract's own random bits, a vector of counters at a time.
#pragma once

#include "../common/philox.h"
#include "query_tile.h"

namespace fastattn::FASTATTN_ISA {

constexpr int WL = VL / 2;  // words a vector: each has 64 bits to hold a product, and only its low half counts
typedef uint64_t vw __attribute__((vector_size(VL * 4)));

// Product of the low halves.
INLINE vw multiply_low(vw words, uint32_t factor) {
#if defined(__AVX512F__)
  return (vw)_mm512_mul_epu32((__m512i)words, _mm512_set1_epi64(factor));
#elif defined(__AVX2__)
  return (vw)_mm256_mul_epu32((__m256i)words, _mm256_set1_epi64x(factor));
#else
  return (words & 0xffffffffu) * static_cast<uint64_t>(factor);
#endif
}

// Philox4x32-10 of N vectors of counters, side by side for the pipeline's sake; only low halves count.
template <int N>
INLINE void philox_vectors(uint64_t seed, vw (&c)[4][N]) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const vw p0 = multiply_low(c[0][n], kPhiloxMultiplier[0]), p1 = multiply_low(c[2][n], kPhiloxMultiplier[1]);
      c[0][n] = (p1 >> 32) ^ c[1][n] ^ static_cast<uint64_t>(k0);
      c[2][n] = (p0 >> 32) ^ c[3][n] ^ static_cast<uint64_t>(k1);
      c[1][n] = p1;
      c[3][n] = p0;
    }
    k0 += kPhiloxStep[0];
    k1 += kPhiloxStep[1];
  }
}

INLINE void keep_or_drop(const Params& p, vw words, float* factor) {
#if defined(__AVX512F__)
  const __mmask8 kept = _mm512_cmpge_epu64_mask((__m512i)words, _mm512_set1_epi64(static_cast<int64_t>(p.drop_below)));
  _mm256_storeu_ps(factor, _mm256_maskz_mov_ps(kept, _mm256_set1_ps(p.keep_scale)));
#else
  alignas(64) uint64_t bits[WL];
  store(bits, words);
  for (int at = 0; at < WL; ++at) factor[at] = bits[at] >= p.drop_below ? p.keep_scale : 0.0f;
#endif
}

// What a weight is multiplied by: 0 where it is dropped, else 1 / (1 - p). For keys [low, high) of the tile of keys
// that starts at `first`; both multiples of four.
static void dropout_factors(const Params& p, const QueryTile& tile, int64_t first, int low, int high, float* factor) {
  constexpr int N = BLOCK_M / WL % 3 == 0 ? 3 : 2;
  alignas(64) uint64_t q_idx[BLOCK_M], head[BLOCK_M];
  for (int lane = 0; lane < BLOCK_M; ++lane) {
    q_idx[lane] = static_cast<uint32_t>(tile.q_idx[lane]);
    head[lane] = static_cast<uint32_t>(tile.head[lane]);
  }
  for (int j = low; j < high; j += 4)
    for (int lane = 0; lane < tile.vectors * VL; lane += N * WL) {
      vw words[4][N];
      for (int n = 0; n < N; ++n) {
        words[0][n] = static_cast<uint64_t>((first + j) / 4) - vw{};
        words[1][n] = load<vw>(q_idx + lane + n * WL);
        words[2][n] = load<vw>(head + lane + n * WL);
        words[3][n] = static_cast<uint64_t>(tile.b) - vw{};
      }
      philox_vectors<N>(p.seed, words);
      for (int word = 0; word < 4; ++word)
        for (int n = 0; n < N; ++n)
          keep_or_drop(p, words[word][n] & 0xffffffffu, factor + (j + word) * BLOCK_M + lane + n * WL);
    }
}

}  // namespace fastattn::FASTATTN_ISA
