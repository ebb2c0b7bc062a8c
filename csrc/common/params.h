// One attention problem as the kernels see it: sizes, pointers, strides in elements. Torch-free.
#pragma once

#include <cstdint>

namespace fastattn {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A tensor [batch, heads, rows, columns]; a stride of 0 repeats. With `blocks` it is a pool [block_count, heads,
// block_size, columns], and row i of item b lies in block blocks[b * blocks_stride + i / block_size].
struct Table {
  void* data = nullptr;
  DType dtype = kFloat32;
  int64_t stride[4] = {0, 0, 0, 0};
  const int32_t* blocks = nullptr;
  int64_t blocks_stride = 0, block_size = 1, block_count = 0;
};

// An int of each batch item, of 32 or 64 bits; a stride of 0 repeats. data null: none.
struct Column {
  const void* data = nullptr;
  bool wide = false;
  int64_t stride = 0;
};

// What a mask is made of: an interval of keys for each query, a bool table, equal ids, or, in the CUDA backend alone,
// the interval [query + low, query + high) in closed form. Where there are columns, both ends of that move by `offset`,
// and it is cut to [first, end).
enum TermKind : int32_t { kInterval = 0, kElements = 1, kIds = 2, kBand = 3 };

struct MaskTerm {
  TermKind kind = kInterval;
  const int32_t* start = nullptr;  // [batch, heads, q_len], inside [0, kv_len]
  const int32_t* stop = nullptr;
  const uint8_t* elements = nullptr;  // [batch, heads, q_len, kv_len]
  const int64_t* q_ids = nullptr;     // [batch, q_len]
  const int64_t* kv_ids = nullptr;    // [batch, kv_len]
  int64_t stride[4] = {0, 0, 0, 0};
  int64_t kv_id_stride[2] = {0, 0};
  int64_t low = 0, high = 0;
  Column offset, first, end;
};

// A band's end where it has none: beyond every key; the sum of three fits an int32.
constexpr int32_t kUnbounded = (1 << 29) - 1;
constexpr int kMostTerms = 32;
constexpr int kMostWords = 64;
constexpr int32_t kPages = 4;  // no term: the tensor that goes with it says where keys and values lie
constexpr int32_t kReach = 5;  // a kBand with columns
constexpr int32_t kAnd = -1;
constexpr int32_t kOr = -2;

// The mask in postfix: a term's number pushes it, kAnd and kOr join the two on top. No words: everything is visible.
struct MaskProgram {
  int32_t terms = 0;
  int32_t words = 0;
  MaskTerm term[kMostTerms];
  int32_t word[kMostWords];
};

// Runs body(first, last, context) over parts of [0, n), in parallel and each part once; n is at most `threads`.
using ParallelFor = void (*)(int64_t n, void (*body)(int64_t first, int64_t last, void* context), void* context);

struct Params {
  int64_t batch = 0, num_heads = 0, num_kv_heads = 0, group = 1;
  int64_t q_len = 0, kv_len = 0, head_dim = 0, head_dim_v = 0;
  DType dtype = kFloat32;
  float scale = 1.0f;
  float softcap = 0.0f;                // 0: none
  Table query, key, value, out, bias;  // bias.data null: none
  const float* sinks = nullptr;        // [num_heads]
  float* lse = nullptr;                // [batch, num_heads, q_len]
  // What rounding took from out and lse, for the backward, and nullptr where nobody keeps it. out_low is written for
  // half dtypes alone; lse_low is NaN where a forward did not know it.
  Table out_low;
  float* lse_low = nullptr;  // [batch, num_heads, q_len]
  MaskProgram mask;
  uint64_t drop_below = 0;  // words below it are dropped; 0: no dropout
  float keep_scale = 1.0f;
  uint64_t seed = 0;
  const int64_t* seed_on_device = nullptr;  // the CUDA backend's

  // Backward.
  Table d_out, dq, dk, dv;
  const float* d_lse = nullptr;  // [batch, num_heads, q_len] or null
  float* row_terms = nullptr;    // scratch [2, batch, num_heads, q_len]
  float* dsinks = nullptr;       // [num_heads]
  Table dbias;  // contiguous, zeros on entry; float32 where pairs share its numbers; data null: unwanted
  int64_t bias_shape[4] = {1, 1, 1, 1};

  // Weights from lse: float32 [batch, num_heads, rows, kv_len], or [batch, 1, rows, kv_len], their mean over the heads;
  // `row_count` negative: every query, and `rows` is null. An empty list has no address either.
  Table weights;
  bool mean_heads = false;
  const int64_t* rows = nullptr;
  int64_t row_count = -1;

  int threads = 1;
  ParallelFor parallel_for = nullptr;
};

}  // namespace fastattn
