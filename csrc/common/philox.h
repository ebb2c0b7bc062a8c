// Philox4x32-10 (Salmon et al. 2011): four random words from a counter of four words and a key of two.
#pragma once

#include <cstdint>

namespace fastattn {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier[2] = {0xD2511F53u, 0xCD9E8D57u};
constexpr uint32_t kPhiloxStep[2] = {0x9E3779B9u, 0xBB67AE85u};

// One word of each counter for N lanes at once; `c` goes in as counters and comes out as random words.
template <int N>
static inline void philox(uint64_t seed, uint32_t (&c)[4][N]) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int lane = 0; lane < N; ++lane) {
      const uint64_t p0 = static_cast<uint64_t>(c[0][lane]) * kPhiloxMultiplier[0];
      const uint64_t p1 = static_cast<uint64_t>(c[2][lane]) * kPhiloxMultiplier[1];
      const uint32_t c1 = c[1][lane], c3 = c[3][lane];
      c[0][lane] = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c[1][lane] = static_cast<uint32_t>(p1);
      c[2][lane] = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c[3][lane] = static_cast<uint32_t>(p0);
    }
    k0 += kPhiloxStep[0];
    k1 += kPhiloxStep[1];
  }
}

}  // namespace fastattn
