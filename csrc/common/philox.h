// Philox4x32-10 (Salmon et al. 2011): four random words from a counter of four words and a key of two.
// Its constants; each backend has the rounds for its own vectors.
#pragma once

#include <cstdint>

namespace fastattn {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier[2] = {0xD2511F53u, 0xCD9E8D57u};
constexpr uint32_t kPhiloxStep[2] = {0x9E3779B9u, 0xBB67AE85u};

}  // namespace fastattn
