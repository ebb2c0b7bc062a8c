// Matrices of a warp: 8x8 pieces between shared memory and registers, and their product (sm_80 and newer; stmatrix
// sm_90).
#pragma once

#include "dialect.h"

namespace fastattn::arch {

// Four 8x8 matrices of 16-bit elements. Lane l passes the address of row l % 8 (16 bytes, aligned) of matrix l / 8; it
// gets, of each matrix, columns 2 (l % 4) and the next one of row l / 4. PTX ISA: ldmatrix.
DEVICE void load_matrix_x4(uint32_t (&fragment)[4], const void* row) {
#ifdef FASTATTN_SIM
  sim::load_matrix(fragment, shared_address(row), false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// The same of the transposed matrices: the lane gets rows 2 (l % 4) and the next one of column l / 4.
DEVICE void load_matrix_x4_transposed(uint32_t (&fragment)[4], const void* row) {
#ifdef FASTATTN_SIM
  sim::load_matrix(fragment, shared_address(row), true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// The way back, same fragments, same addresses. PTX ISA: stmatrix.
DEVICE void store_matrix_x4(void* row, const uint32_t (&fragment)[4]) {
#ifdef FASTATTN_SIM
  sim::store_matrix(shared_address(row), fragment, false);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
               : "memory");
#endif
}

DEVICE void store_matrix_x4_transposed(void* row, const uint32_t (&fragment)[4]) {
#ifdef FASTATTN_SIM
  sim::store_matrix(shared_address(row), fragment, true);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
               : "memory");
#endif
}

// d[16, 8] += a[16, 16] b[16, 8], float32 sums. Lane l holds, with g = l / 4 and t = 2 (l % 4): of d rows g and g + 8,
// columns t, t + 1; a[0..3] at (g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8), two columns each; b[0..1] at rows t and
// t + 8, two rows each, of column g. PTX ISA: mma (m16n8k16).
template <class T>
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(same_type<T, bf16> || same_type<T, f16>, "bf16 or f16");
#ifdef FASTATTN_SIM
  sim::mma_m16n8k16(d, a, b, same_type<T, bf16>);
#else
  if constexpr (same_type<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

}  // namespace fastattn::arch
