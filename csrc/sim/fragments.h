// Which element of a matrix each register of a thread holds. PTX ISA: the register fragments of mma and of wgmma.
#pragma once

namespace fastattn::sim {

struct Place {
  int row, column;
};

// D of wgmma, [64, n] float32: register i of a thread of the warpgroup. Of mma.m16n8k16, [16, 8]: the first warp's.
inline Place accumulator(int thread, int i) {
  return {thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + thread % 4 * 2 + i % 2};
}

// A of wgmma, [64, 16] halves, and of mma.m16n8k16, [16, 16]: half i of the thread's eight.
inline Place a_fragment(int thread, int i) {
  return {thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, thread % 4 * 2 + i % 2 + i / 4 * 8};
}

// B of mma.m16n8k16, [16, 8] halves: half i of the lane's four.
inline Place b_fragment(int lane, int i) { return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4}; }

}  // namespace fastattn::sim
