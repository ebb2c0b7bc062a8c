// The CPU backend's passes on threads of our own, without torch: what ThreadSanitizer watches (make sanitize), and a
// check that any number of threads gives the same bits.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/dispatch.h"

namespace {

using namespace fastattn;

// One thread a part, all at once.
void on_threads(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> team;
  for (int64_t part = 0; part < n; ++part) team.emplace_back(body, part, part + 1, context);
  for (auto& each : team) each.join();
}

Table rows(std::vector<float>& data, int64_t heads, int64_t length, int64_t width) {
  Table table;
  table.data = data.data();
  const int64_t stride[4] = {heads * length * width, length * width, width, 1};
  std::memcpy(table.stride, stride, sizeof stride);
  return table;
}

struct Results {
  std::vector<float> out, lse, dq, dk, dv, dbias, dsinks, weights;

  bool operator==(const Results& other) const {
    return out == other.out && lse == other.lse && dq == other.dq && dk == other.dk && dv == other.dv &&
           dbias == other.dbias && dsinks == other.dsinks && weights == other.weights;
  }
};

struct Sizes {
  int64_t batch, num_heads, num_kv_heads, q_len, kv_len, head_dim;
  bool causal;
};

std::vector<float> drawn(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> data(count);
  for (auto& each : data) each = normal(generator);
  return data;
}

// Every pass of one problem; a sentence where a pass refuses it.
const char* solve(const Sizes& s, int threads, Results& r) {
  const int64_t queries = s.batch * s.num_heads * s.q_len, keys = s.batch * s.num_kv_heads * s.kv_len;
  auto query = drawn(queries * s.head_dim, 1), key = drawn(keys * s.head_dim, 2), value = drawn(keys * s.head_dim, 3);
  auto d_out = drawn(queries * s.head_dim, 4), d_lse = drawn(queries, 5), sinks = drawn(s.num_heads, 6);
  auto bias = drawn(s.q_len * s.kv_len, 7);
  std::vector<float> row_terms(2 * queries);
  r.out.resize(queries * s.head_dim);
  r.lse.resize(queries);
  r.dq.resize(query.size());
  r.dk.resize(key.size());
  r.dv.resize(value.size());
  r.dbias.assign(bias.size(), 0.0f);
  r.dsinks.resize(s.num_heads);
  r.weights.resize(queries * s.kv_len);

  Params p;
  p.batch = s.batch;
  p.num_heads = s.num_heads;
  p.num_kv_heads = s.num_kv_heads;
  p.group = s.num_heads / s.num_kv_heads;
  p.q_len = s.q_len;
  p.kv_len = s.kv_len;
  p.head_dim = p.head_dim_v = s.head_dim;
  p.scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  p.query = rows(query, s.num_heads, s.q_len, s.head_dim);
  p.key = rows(key, s.num_kv_heads, s.kv_len, s.head_dim);
  p.value = rows(value, s.num_kv_heads, s.kv_len, s.head_dim);
  p.out = rows(r.out, s.num_heads, s.q_len, s.head_dim);
  p.bias = rows(bias, 0, s.q_len, s.kv_len);
  p.bias.stride[0] = p.bias.stride[1] = 0;
  p.bias_shape[2] = s.q_len;
  p.bias_shape[3] = s.kv_len;
  p.sinks = sinks.data();
  p.lse = r.lse.data();
  std::vector<int32_t> ends(2 * s.q_len);
  for (int64_t i = 0; i < s.q_len; ++i) {
    const int64_t stop = i + 1 + s.kv_len - s.q_len;
    ends[s.q_len + i] = static_cast<int32_t>(stop < 0 ? 0 : stop > s.kv_len ? s.kv_len : stop);
  }
  if (s.causal) {
    p.mask.terms = p.mask.words = 1;
    p.mask.word[0] = 0;
    p.mask.term[0].start = ends.data();
    p.mask.term[0].stop = ends.data() + s.q_len;
    p.mask.term[0].stride[2] = 1;
  }
  p.threads = threads;
  p.parallel_for = threads > 1 ? on_threads : nullptr;
  if (const char* refusal = cpu::forward(p)) return refusal;
  p.d_out = rows(d_out, s.num_heads, s.q_len, s.head_dim);
  p.dq = rows(r.dq, s.num_heads, s.q_len, s.head_dim);
  p.dk = rows(r.dk, s.num_kv_heads, s.kv_len, s.head_dim);
  p.dv = rows(r.dv, s.num_kv_heads, s.kv_len, s.head_dim);
  p.d_lse = d_lse.data();
  p.row_terms = row_terms.data();
  p.dbias = rows(r.dbias, 1, s.q_len, s.kv_len);
  p.dsinks = r.dsinks.data();
  if (const char* refusal = cpu::backward(p)) return refusal;
  p.weights = rows(r.weights, s.num_heads, s.q_len, s.kv_len);
  return cpu::weights(p);
}

}  // namespace

int main() {
  const Sizes problems[] = {{1, 1, 1, 300, 300, 32, true},
                            {2, 4, 2, 70, 130, 40, false},
                            {1, 2, 1, 1, 900, 64, false},
                            {1, 3, 1, 5, 0, 8, false}};
  for (const Sizes& sizes : problems) {
    Results alone;
    if (const char* refusal = solve(sizes, 1, alone)) return std::printf("%s\n", refusal), 1;
    for (int threads = 2; threads <= 5; ++threads) {
      Results together;
      if (const char* refusal = solve(sizes, threads, together)) return std::printf("%s\n", refusal), 1;
      if (!(alone == together))
        return std::printf("%d threads give other bits, q_len %d\n", threads, (int)sizes.q_len), 1;
    }
  }
  std::printf("any number of threads gives the same bits (%s)\n", cpu::isa());
  return 0;
}
