// The CPU backend's entry points. Each takes one problem, picks the instruction set, and gives null or a sentence on
// what went wrong.
#pragma once

#include "../common/params.h"

namespace fastattn::cpu {

// out and lse.
const char* forward(const Params& p);

// dq, dk, dv and, where their pointers are there, dsinks and dbias, from out, lse, d_out and d_lse.
const char* backward(const Params& p);

// Weights from lse.
const char* weights(const Params& p);

// Whether this thread has less stack left than the kernels may take.
bool short_of_stack();

// The instruction set in use: the best that this machine has, or the one that FASTATTN_CPU_ISA names, read at each
// call.
const char* isa();

// Those that this machine has, worst first, separated by spaces.
const char* isas();

}  // namespace fastattn::cpu
