// The loading warp: works out each job, tells the others, and keeps their rings of keys and values full.
#pragma once

#include "shared.h"

namespace fastattn::cuda {

template <class F>
struct Loader {
  const ForwardArgs& a;
  Shared<F>& s;
  Ring<F::STAGES> ring;   // of keys and of values: a tile has the same place in both
  uint32_t parities = 0;  // of the queries' and of the landed values' barriers, a bit each

  DEVICE Loader(const ForwardArgs& args, Shared<F>& shared) : a(args), s(shared) {}

  static DEVICE int lane() { return threadIdx.x % arch::kWarp; }
  static DEVICE bool leads() { return lane() == 0; }

  DEVICE void run() {
    if (leads()) {
      s.program = blockIdx.x;
      s.round = 0;
    }
    __syncwarp();
    for (;;) {
      Job& job = s.job[s.round & 1];
      arch::mbarrier_wait(&s.job_empty[s.round & 1], ~s.round >> 1 & 1);
      const bool there = s.program < a.programs;
      if (there) {
        if (leads()) job.place = place_of<F::BLOCK_M>(a, s.program);
        __syncwarp();
        note_steps<F::BLOCK_N, F::VARIANT>(a, job.place, s.steps);
      }
      if (leads()) {
        job.steps = there ? s.steps.end - s.steps.begin : 0;
        job.there = there;
        arch::mbarrier_arrive(&s.job_full[s.round & 1]);
      }
      __syncwarp();
      if (!there) return;
      load(job.place);
      if (leads()) {
        s.program = next_program<F::VARIANT>(a, s.program, s.round);
        ++s.round;
      }
      __syncwarp();
    }
  }

  // Keys run one tile ahead of the values.
  DEVICE void load(const Place& place) {
    Ring<F::STAGES> values = ring;
#pragma unroll 1
    for (int32_t n = s.steps.begin; n < s.steps.end; ++n) {
      const int32_t tile = key_tile(s.steps, n), note = pack_note(tile, needs_check(s.steps, n, tile));
      load_keys(place, note);
      if (n == s.steps.begin) {
        load_queries(place);
      } else {
        load_values(place, values);
        values.next();
      }
      ring.next();
    }
    if (s.steps.begin < s.steps.end) load_values(place, values);
  }

  DEVICE void load_queries(const Place& at) {
    arch::mbarrier_wait(&s.query_empty, ~parities & 1);
    if (leads()) {
      // Rows that no box covers were zeroed once, and stay so.
      arch::mbarrier_arrive_expect(&s.query_full, F::PIECES * a.tile_heads * a.tile_rows * 128);
#pragma unroll 1
      for (int piece = 0; piece < F::PIECES; ++piece)
        arch::tma_load(s.query + piece * F::BLOCK_M * 64, &a.query, &s.query_full, piece * 64, at.q_first,
                       at.head - at.kv_head * a.group, at.kv_head, at.batch * a.query_step);
    }
    parities ^= 1;
  }

  DEVICE void load_keys(const Place& at, int32_t note) {
    const int32_t first = tile_of(note) * F::BLOCK_N;
    arch::Mbarrier* full = &s.key_full[ring.place()];
    const int2 run = find_run(at, first, 0);
    arch::mbarrier_wait(&s.key_empty[ring.place()], ring.round() ^ 1);
    if (leads()) {
      s.note[ring.place()] = note;
      arch::mbarrier_arrive_expect(full, sizeof s.key[0]);
    }
    copy_tile<F::PIECES>(s.key[ring.place()], &a.key, full, at, first, a.key_step, run);
  }

  DEVICE void load_values(const Place& at, const Ring<F::STAGES>& values) {
    __syncwarp();
    const int32_t note = s.note[values.place()];  // of its keys
    const bool looks = F::VARIANT != kPlain && a.hides && (F::VARIANT == kGeneral || checks(note));
    const int32_t first = tile_of(note) * F::BLOCK_N;
    arch::Mbarrier* full = looks ? &s.value_landed : &s.value_full[values.place()];
    const int2 run = find_run(at, first, 0);
    arch::mbarrier_wait(&s.value_empty[values.place()], values.round() ^ 1);
    if (leads()) {
      if (F::VARIANT != kPlain && !looks && a.hides)
        for (uint32_t& word : s.nonfinite[values.place()]) word = 0;
      arch::mbarrier_arrive_expect(full, sizeof s.value[0]);
    }
    copy_tile<F::PIECES_V>(s.value[values.place()], &a.value, full, at, first, a.value_step, run);
    if (looks) {
      arch::mbarrier_wait(&s.value_landed, parities >> 1);
      parities ^= 2;
      zero_nonfinite_values(values.place());
      arch::fence_proxy_async();
      arrive_warp(&s.value_full[values.place()]);
    }
  }

  // A tile of keys or values from `first` on: one box, or one for each run; zeros beyond the last key. `run` is what
  // find_run(at, first, 0) gave.
  template <int PIECES>
  DEVICE void copy_tile(uint16_t* tile, const arch::TensorMap* map, arch::Mbarrier* full, const Place& at,
                        int32_t first, const int32_t (&step)[2], int2 run) {
    if (!in_blocks()) {
      if (leads()) {
#pragma unroll 1
        for (int piece = 0; piece < PIECES; ++piece)
          arch::tma_load(tile + piece * F::BLOCK_N * 64, map, full, piece * 64, first, at.kv_head * step[1],
                         at.batch * step[0]);
      }
      return;
    }
#pragma unroll 1
    for (int32_t row = 0, n = 0; row < F::BLOCK_N; row += a.pages.run, ++n) {
      if (n == arch::kWarp) {
        n = 0;
        run = find_run(at, first, row);
      }
      const int32_t y = __shfl_sync(~0u, run.x, n), block = __shfl_sync(~0u, run.y, n);
      if (leads()) {
#pragma unroll 1
        for (int piece = 0; piece < PIECES; ++piece)
          arch::tma_load(tile + (piece * F::BLOCK_N + row) * 64, map, full, piece * 64, y, at.kv_head * step[1],
                         block * step[0]);
      }
    }
  }

  DEVICE bool in_blocks() const { return F::VARIANT != kPlain && a.pages.table; }

  // Where this lane's run of a tile lies, the lanes' runs counted from row `row` of the tile: its row in a block, and
  // the block; beyond the last key a row that is in none. Asked before the wait for a free place, which it hides under.
  DEVICE int2 find_run(const Place& at, int32_t first, int32_t row) const {
    if (!in_blocks()) return make_int2(0, 0);
    const int32_t key = first + row + lane() * a.pages.run;
    if (key >= a.kv_len) return make_int2(a.pages.block_size, 0);
    const int32_t column = key / a.pages.block_size;
    const int32_t block = a.pages.table[at.batch * a.pages.stride + column];
    return make_int2(key - column * a.pages.block_size, clamp(block, a.pages.block_count - 1));
  }

  // A key that nobody sees weighs 0, and 0 times NaN is NaN: rows of values that are not finite are set to 0, and
  // noted for who may see them. A lane looks at whole rows, 16 bytes at a time; the swizzle moves those within a row.
  DEVICE void zero_nonfinite_values(int place) {
    uint16_t* tile = s.value[place];
#pragma unroll 1
    for (int first = 0; first < F::BLOCK_N; first += arch::kWarp) {
      const int row = first + threadIdx.x % arch::kWarp;
      bool nonfinite = false;
      if (row < F::BLOCK_N) {
#pragma unroll 1
        for (int piece = 0; piece < F::PIECES_V; ++piece) {
          const uint4* at = reinterpret_cast<const uint4*>(tile + (piece * F::BLOCK_N + row) * 64);
#pragma unroll 2
          for (int part = 0; part < 8; ++part) nonfinite |= any_nonfinite(at[(part + row) % 8]);
        }
        if (nonfinite)
          for (int piece = 0; piece < F::PIECES_V; ++piece) {
            uint4* at = reinterpret_cast<uint4*>(tile + (piece * F::BLOCK_N + row) * 64);
            for (int part = 0; part < 8; ++part) at[(part + row) % 8] = make_uint4(0, 0, 0, 0);
          }
      }
      const uint32_t word = __ballot_sync(~0u, nonfinite);
      if (leads()) s.nonfinite[place][first / arch::kWarp] = word;
    }
  }

  // Whether one of eight halves has an exponent of ones only.
  static DEVICE bool any_nonfinite(uint4 eight) {
    constexpr uint32_t exponent = arch::same_type<typename F::T, arch::bf16> ? 0x7f80u : 0x7c00u;
    bool nonfinite = false;
    for (const uint32_t two : {eight.x, eight.y, eight.z, eight.w})
      nonfinite |= (two & exponent) == exponent || (two >> 16 & exponent) == exponent;
    return nonfinite;
  }
};

}  // namespace fastattn::cuda
