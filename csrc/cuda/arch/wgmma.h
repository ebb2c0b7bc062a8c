// wgmma: a warpgroup's asynchronous matrix product, m64nNk16 in bf16 or f16 with float32 sums. B and, for `_ss`, A are
// read from shared memory through descriptors; for `_rs` A comes in registers.
//
//   settle_registers(d);                 // where they were written before
//   wgmma_fence();                       // before the first product of a batch: orders the registers
//   wgmma_ss<N, T>(d, a, b, false); ...  // issued; d (and A's registers) must not be touched
//   wgmma_commit();                      // the products since the last commit are a batch
//   wgmma_wait<0>();                     // at most this many batches are still in flight
//   settle_registers(d);                 // now they may be read
//
// Thread t of the warpgroup holds, of D[64, N], d[4 j + 2 h + e] = D[16 (t / 32) + (t % 32) / 4 + 8 h, 8 j + 2 (t % 4)
// + e]; of A[64, 16], a[i] = the two elements of row 16 (t / 32) + (t % 32) / 4 + 8 (i % 2) from column 2 (t % 4) + 8
// (i / 2). So two neighbouring 8-column pieces of a D, packed, are an A: a[i] of step kk = pack(d[8 kk + 2 i], d[8 kk +
// 2 i + 1]).
#pragma once

#include "dialect.h"

#ifndef FASTATTN_SIM
#include "wgmma/variants.h"
#endif

namespace fastattn::arch {

// Which dimension of an operand is contiguous in shared memory: k (a row of A, or a column of B), or m or n.
enum class Major : int { kK = 0, kMN = 1 };

// Orders the warpgroup's accesses to accumulator and A registers before the products that follow. PTX ISA: wgmma.fence.
DEVICE void wgmma_fence() {
#ifdef FASTATTN_SIM
  sim::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// No instruction: the compiler computes these registers before this point and reads them after it. Once before
// wgmma_fence(), where registers were written, and once after the wait, so that nothing moves across.
template <class T, int COUNT>
DEVICE void settle_registers(T (&registers)[COUNT]) {
#ifdef FASTATTN_SIM
  static_cast<void>(registers);
#else
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if constexpr (same_type<T, float>) {
      asm volatile("" : "+f"(registers[i])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i])::"memory");
    }
  }
#endif
}

// PTX ISA: wgmma.commit_group.
DEVICE void wgmma_commit() {
#ifdef FASTATTN_SIM
  sim::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// PTX ISA: wgmma.wait_group.
template <int PENDING>
DEVICE void wgmma_wait() {
#ifdef FASTATTN_SIM
  sim::wgmma_wait(PENDING);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#endif
}

// d = A B, or d + A B where `accumulate`; A[64, 16] and B[16, N] in shared memory. PTX ISA: wgmma.mma_async.
template <int N, class T, Major A = Major::kK, Major B = Major::kK>
DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(same_type<T, bf16> || same_type<T, f16>, "bf16 or f16");
#ifdef FASTATTN_SIM
  sim::wgmma(N, same_type<T, bf16>, d, nullptr, a, A == Major::kMN, b, B == Major::kMN, accumulate);
#else
  constexpr int kA = static_cast<int>(A), kB = static_cast<int>(B);
  if constexpr (same_type<T, bf16>) {
    WgmmaVariant<N>::template bf16_ss<kA, kB>(d, a, b, accumulate);
  } else {
    WgmmaVariant<N>::template f16_ss<kA, kB>(d, a, b, accumulate);
  }
#endif
}

// The same with A's fragment in registers.
template <int N, class T, Major B = Major::kK>
DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(same_type<T, bf16> || same_type<T, f16>, "bf16 or f16");
#ifdef FASTATTN_SIM
  sim::wgmma(N, same_type<T, bf16>, d, a, 0, false, b, B == Major::kMN, accumulate);
#else
  constexpr int kB = static_cast<int>(B);
  if constexpr (same_type<T, bf16>) {
    WgmmaVariant<N>::template bf16_rs<kB>(d, a, b, accumulate);
  } else {
    WgmmaVariant<N>::template f16_rs<kB>(d, a, b, accumulate);
  }
#endif
}

// Describes an operand that TMA loaded with the 128-byte swizzle: rows of 128 bytes, 64 elements, eight rows to a
// pattern of 1024 bytes. `start` is aligned to 1024 bytes. Add bytes / 16 to move: +2 is 16 elements along the row.
//
// K-major: a row is one m or n, 64 ks wide; `stride` is the distance of 8 rows, 1024 where the tile's rows lie side by
// side; `leading` is not read. MN-major: a row is one k, 64 ms or ns wide; `stride` is the distance of 8 ks, `leading`
// that of 64 ms or ns (BLOCK_K * 128 where a tile of 64 columns follows another; the last may be used in part: 96
// columns were right on an H200 in November 2026). PTX ISA: matrix-descriptor of wgmma.
DEVICE uint64_t descriptor_128(const void* start, uint32_t stride = 1024, uint32_t leading = 16) {
  return static_cast<uint64_t>((shared_address(start) & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62;
}

}  // namespace fastattn::arch
