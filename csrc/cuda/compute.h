// A computing warpgroup: 64 rows of each tile of queries.
//
// The next scores are multiplied while the current weights meet their values, and the exponentials run under both
// (Shah et al. 2024, FlashAttention-3): warpgroups take turns on the tensor cores, so that one multiplies while another
// is busy with its softmax.
#pragma once

#include "scores.h"
#include "shared.h"

namespace fastattn::cuda {

template <class F>
struct Computer {
  using T = typename F::T;
  static constexpr bool NATURAL = F::VARIANT == kGeneral;
  // The next keys are waited for after the softmax and not at the loop's head: a branch, over which the compiler does
  // not lift the wait for the values' product. Without it that stands before the softmax, which then has nothing to run
  // under. A natural softmax has branches of its own, and no register to spare.
  static constexpr bool WAITS_AHEAD = !NATURAL;

  const ForwardArgs& a;
  Shared<F>& s;
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / arch::kWarpgroup, 0) - 1;  // the same for a warp
  const int thread = threadIdx.x % arch::kWarpgroup;
  const int lane = threadIdx.x % arch::kWarp;
  const int key_of_thread = 2 * (lane % 4);
  Ring<2> jobs;
  Ring<1> queries;
  Ring<F::STAGES> keys, values;

  DEVICE Computer(const ForwardArgs& args, Shared<F>& shared) : a(args), s(shared) {}

  DEVICE void run() {
    if (F::TURNS && group == F::CONSUMERS - 1) pass_turn();
    for (;;) {
      arch::mbarrier_wait(&s.job_full[jobs.place()], jobs.round());
      const Job& job = s.job[jobs.place()];
      if (!job.there) break;
      compute(job.place, job.steps);
      arrive_warp(&s.job_empty[jobs.place()]);
      jobs.next();
    }
    if (F::TURNS && group == 0) take_turn();  // the last one passed on
  }

  DEVICE void take_turn() {
    if (F::TURNS) arch::barrier_sync(kTurnBarrier + group, 2 * arch::kWarpgroup);
  }
  DEVICE void pass_turn() {
    if (F::TURNS) arch::barrier_arrive(kTurnBarrier + (group + 1) % F::CONSUMERS, 2 * arch::kWarpgroup);
  }

  // Scores of a tile of keys, not waited for.
  DEVICE void issue_scores(float (&x)[F::SCORES]) {
    int32_t at[1] = {group * 64 * 64};
    if (NATURAL && F::WIDTH > 192) arch::settle_registers(at);  // made anew each time: there are none to keep them in
    const uint64_t query = arch::descriptor_128(s.query + at[0]);
    const uint64_t key = arch::descriptor_128(s.key[keys.place()]);
    constexpr int QUERY_PIECE = F::BLOCK_M * 128 / 16, KEY_PIECE = F::BLOCK_N * 128 / 16;
    arch::settle_registers(x);
    arch::wgmma_fence();
#pragma unroll
    for (int k = 0; k < F::WIDTH / 16; ++k)
      arch::wgmma_ss<F::BLOCK_N, T>(x, query + k / 4 * QUERY_PIECE + k % 4 * 2, key + k / 4 * KEY_PIECE + k % 4 * 2,
                                    k != 0);
    arch::wgmma_commit();
  }

  // Weights by values, onto what is there, not waited for.
  DEVICE void issue_values(float (&out)[F::OUT], uint32_t (&weights)[F::BLOCK_N / 16][4]) {
    const uint64_t value = arch::descriptor_128(s.value[values.place()], 1024, F::BLOCK_N * 128);
    arch::settle_registers(out);
    for (auto& each : weights) arch::settle_registers(each);
    arch::wgmma_fence();
#pragma unroll
    for (int k = 0; k < F::BLOCK_N / 16; ++k)
      arch::wgmma_rs<F::WIDTH_V, T, arch::Major::kMN>(out, weights[k], value + k * (16 * 128 / 16), true);
    arch::wgmma_commit();
  }

  DEVICE int32_t first_row() const { return group * 64 + thread / arch::kWarp * 16 + lane / 4; }

  DEVICE void compute(const Place& place, int32_t steps) {
    float out[F::OUT];
    Softmax softmax;
    softmax.clear();
    if (steps > 0) {
      note_intervals(place);
      attend(place, steps, softmax, out);
    } else {
      clear(out);
    }
    finish(place, softmax, out);
  }

  static DEVICE void clear(float (&out)[F::OUT]) {
#pragma unroll
    for (int n = 0; n < F::OUT; ++n) out[n] = 0.0f;
  }

  DEVICE void attend(const Place& place, int32_t steps, Softmax& softmax, float (&out)[F::OUT]) {
    uint32_t weights[F::BLOCK_N / 16][4];
    float rescale[2];
    arch::mbarrier_wait(&s.query_full, queries.round());
    queries.next();
    {
      float x[F::SCORES];
      wait_for_keys();
      take_turn();
      issue_scores(x);
      pass_turn();
      const int32_t note = s.note[keys.place()];
      arch::wgmma_wait<0>();
      arch::settle_registers(x);
      release_keys(steps == 1);
      online_softmax_step(note, place, softmax, x, rescale);
      drop_some(note, place, x);
      pack_weights(x, weights);
    }
    clear(out);
    if (WAITS_AHEAD && steps > 1) wait_for_keys();
#pragma unroll 1
    while (--steps > 0) {
      float x[F::SCORES];
      if (!WAITS_AHEAD) wait_for_keys();
      take_turn();
      issue_scores(x);
      wait_for_values(weights, softmax);
      issue_values(out, weights);
      pass_turn();
      const int32_t note = s.note[keys.place()];
      arch::wgmma_wait<1>();
      arch::settle_registers(x);
      release_keys(steps == 1);
      const bool grows = online_softmax_step(note, place, softmax, x, rescale);
      drop_some(note, place, x);
      if (WAITS_AHEAD && steps > 1) wait_for_keys();
      arch::wgmma_wait<0>();
      arch::settle_registers(out);
      release_values();
      if (grows) {
#pragma unroll
        for (int m = 0; m < F::OUT; ++m) out[m] *= rescale[row_of(m)];
      }
      pack_weights(x, weights);
    }
    take_turn();
    wait_for_values(weights, softmax);
    issue_values(out, weights);
    pass_turn();
    arch::wgmma_wait<0>();
    arch::settle_registers(out);
    release_values();
  }

  // What each row sees, for the tiles that are checked: a lane for each interval of the warp's 16 rows.
  DEVICE void note_intervals(const Place& place) {
    if (F::VARIANT == kPlain || (F::VARIANT == kGeneral && a.listed)) return;
    int32_t at[1] = {thread};
    arch::settle_registers(at);  // what follows is worked out here, and not kept from one job to the next
    const int local = group * 64 + at[0] / arch::kWarp * 16 + at[0] % arch::kWarp / 2, term = at[0] % 2;
    const int2 row = row_of(a, place, local);
    int2 seen = make_int2(0, 0);
    if (term < a.terms && is_row(a, place, row))
      seen = keys_of(a, a.interval[term], place.batch, place.head + row.x, row.y);
    __syncwarp();
    reinterpret_cast<int2*>(&s.seen[local])[term] = seen;
    __syncwarp();
  }

  DEVICE void wait_for_keys() { arch::mbarrier_wait(&s.key_full[keys.place()], keys.round()); }

  DEVICE void release_keys(bool last) {
    arrive_warp(&s.key_empty[keys.place()]);
    if (last) arrive_warp(&s.query_empty);
    keys.next();
  }

  DEVICE void wait_for_values(const uint32_t (&weights)[F::BLOCK_N / 16][4], Softmax& softmax) {
    arch::mbarrier_wait(&s.value_full[values.place()], values.round());
    if (F::VARIANT != kPlain && a.hides) spread_nonfinite(weights, softmax);
  }

  DEVICE void release_values() {
    arrive_warp(&s.value_empty[values.place()]);
    values.next();
  }

  // Values that were not finite are zeros now: a row that sees one of them becomes NaN.
  DEVICE void spread_nonfinite(const uint32_t (&weights)[F::BLOCK_N / 16][4], Softmax& softmax) {
#pragma unroll
    for (int word = 0; word < (F::BLOCK_N + 31) / 32; ++word) {
      const uint32_t nonfinite = s.nonfinite[values.place()][word];
      if (nonfinite == 0) continue;
#pragma unroll
      for (int k = 2 * word; k < 2 * word + 2 && k < F::BLOCK_N / 16; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const uint32_t of_keys = nonfinite >> (k % 2 * 16 + e / 2 * 8 + key_of_thread);
          const bool low = (of_keys & 1) && (weights[k][e] & 0x7fffu);
          const bool high = (of_keys & 2) && (weights[k][e] & 0x7fff0000u);
          if (low || high) softmax.sum[e % 2] = NAN;
        }
    }
  }

  DEVICE bool online_softmax_step(int32_t note, const Place& place, Softmax& softmax, float (&x)[F::SCORES],
                                  float (&rescale)[2]) {
    const int32_t first = tile_of(note) * F::BLOCK_N + key_of_thread;
    if constexpr (NATURAL) finish_scores(x, a, Rows(a, place, first_row()), first);
    if (checks(note)) hide(place, first, x);
    return softmax.template step<F::TILE.poly_every, NATURAL>(x, a.factor, a.lowest, rescale);
  }

  DEVICE void hide(const Place& place, int32_t first, float (&x)[F::SCORES]) {
    if constexpr (F::VARIANT == kPlain) {
      hide_beyond(x, a.kv_len - first);
      return;
    } else if constexpr (F::VARIANT == kGeneral) {
      if (a.listed) {
        hide_by_program(x, a, Rows(a, place, first_row()), first);
        return;
      }
    }
    const int4 seen[2] = {s.seen[first_row()], s.seen[first_row() + 8]};
    hide_outside(x, seen, a.terms == 2, first);
  }

  DEVICE void drop_some(int32_t note, const Place& place, float (&x)[F::SCORES]) {
    if constexpr (F::VARIANT == kGeneral) {
      if (a.drops) drop(x, a, Rows(a, place, first_row()), tile_of(note) * F::BLOCK_N + key_of_thread);
    }
  }

  static DEVICE void pack_weights(const float (&x)[F::SCORES], uint32_t (&weights)[F::BLOCK_N / 16][4]) {
#pragma unroll
    for (int k = 0; k < F::BLOCK_N / 16; ++k)
#pragma unroll
      for (int e = 0; e < 4; ++e) weights[k][e] = arch::pack<T>(x[8 * k + 2 * e], x[8 * k + 2 * e + 1]);
  }

  DEVICE void finish(const Place& place, Softmax& softmax, float (&out)[F::OUT]) {
    const Rows rows(a, place, first_row());
    softmax.gather();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float* sink = a.sinks && !a.parts ? a.sinks + rows.head[r] : nullptr;  // parts: when they are merged
      float weight = softmax.template weight<NATURAL>(r, a.factor, sink);
      if (F::VARIANT == kGeneral && a.drops) weight *= a.keep_scale;
#pragma unroll
      for (int m = 0; m < F::OUT; ++m)
        if (row_of(m) == r) out[m] *= weight;
      const int64_t row =
          ((static_cast<int64_t>(place.split) * a.batch + place.batch) * a.num_heads + rows.head[r]) * a.q_len +
          rows.q_idx[r];
      if (!rows.there[r]) continue;
      if (lane % 4 == 0) arch::store_global(a.lse + row, softmax.template lse<NATURAL>(r, a.factor));
      if (a.parts) write_part(a.parts + row * a.part_step, r, out);
    }
    if (!a.parts) write_out(place, rows, out);
  }

  // A quad's pairs are 8 columns of a row: a sector. Rows are whole eights, whose last columns no value reaches.
  DEVICE void write_part(float* to, int r, const float (&out)[F::OUT]) {
#pragma unroll
    for (int m = 0; m < F::OUT / 4; ++m)
      if (8 * m < a.part_step)
        arch::store_global(to + 8 * m + key_of_thread, make_float2(out[4 * m + 2 * r], out[4 * m + 2 * r + 1]));
  }

  // A quad holds 8 columns of a row in pairs: transposed, each of its threads has 8 columns of every 32, 16 bytes. Its
  // 64 bytes are two sectors, where rows begin at one.
  DEVICE void write_out(const Place& place, const Rows& rows, const float (&out)[F::OUT]) {
    uint16_t* const base = static_cast<uint16_t*>(a.out);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint16_t* const to =
          base + place.batch * a.out_stride[0] + rows.head[r] * a.out_stride[1] + rows.q_idx[r] * a.out_stride[2];
#pragma unroll
      for (int m = 0; m < F::WIDTH_V / 32; ++m) {
        uint32_t pairs[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int n = 4 * (4 * m + e) + 2 * r;
          pairs[e] = arch::pack<T>(out[n], out[n + 1]);
        }
        transpose_quad(pairs);
        const int column = 32 * m + 8 * (lane % 4);
        if (!rows.there[r]) continue;
        if (a.out_aligned && column + 8 <= a.head_dim_v) {
          arch::store_global(to + column, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
        } else {
#pragma unroll
          for (int e = 0; e < 8; ++e)
            if (column + e < a.head_dim_v) to[column + e] = static_cast<uint16_t>(pairs[e / 2] >> (16 * (e % 2)));
        }
      }
    }
  }

  // pairs[e] of thread t becomes pairs[t] of thread e, t and e within the quad.
  DEVICE void transpose_quad(uint32_t (&pairs)[4]) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const bool upper = lane & step;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (e & step) continue;
        const uint32_t given = __shfl_xor_sync(~0u, upper ? pairs[e] : pairs[e + step], step);
        if (upper)
          pairs[e] = given;
        else
          pairs[e + step] = given;
      }
    }
  }
};

}  // namespace fastattn::cuda
