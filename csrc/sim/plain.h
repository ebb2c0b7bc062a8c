// Accesses through ordinary pointers, as the compiler's instrumentation reports them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastattn::sim {

// Looks at those to the running thread's shared memory; `access` is of shadow.h.
void plain_access(const void* pointer, size_t bytes, uint8_t access, const char* instruction);

}  // namespace fastattn::sim
