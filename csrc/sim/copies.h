// What every asynchronous copy begins with.
#pragma once

#include <cstdint>
#include <memory>

#include "machine.h"

namespace fastattn::sim {

// A copy of the running thread, with a stamp of its own.
std::shared_ptr<Copy> new_copy(const char* instruction);

// The mbarrier is one, and the copy engine has heard of it.
void announced(uint32_t barrier);

}  // namespace fastattn::sim
