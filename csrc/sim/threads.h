// What a running thread of a kernel knows of itself, and how it waits for its warp and its block.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_types.h"

namespace fastattn::sim {

uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
int lane();

void sync_block();
void sync_warp(unsigned mask);

// Puts the calling thread behind the others, once.
void let_others_run(const char* instruction);

// `value` becomes that of the lane `from`.
void shuffle(unsigned mask, void* value, size_t bytes, int from, const char* instruction);
unsigned ballot(unsigned mask, bool predicate);

// An access that other threads may make at the same time. The value itself is then moved unseen by the checks.
void atomic_access(void* where, size_t bytes);
void move_unseen(void* to, const void* from, size_t bytes);

}  // namespace fastattn::sim
