// The backends in C++ as torch operators, on the LibTorch stable ABI: one binary for every torch from 2.11 on and any
// Python.
//
// Each has a library of its own, with this file in it: FASTATTN_CUDA_BACKEND says which. The only file that includes a
// torch header. The operators check nothing: fastattn/spec.py has done so. They write
// into the tensors that they are given, and a problem that the backend cannot solve becomes an error with its sentence.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#ifdef FASTATTN_CUDA_BACKEND
#include <dlfcn.h>
#endif

#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/params.h"
#ifdef FASTATTN_CUDA_BACKEND
#include "cuda/request.h"
#else
#include "cpu/dispatch.h"
#endif

namespace {

using fastattn::Column;
using fastattn::DType;
using fastattn::MaskTerm;
using fastattn::Params;
using fastattn::Table;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

#ifndef FASTATTN_CUDA_BACKEND
// torch's own pool: where it is busy with this thread already, the parts run one after the other. Parts take the items
// of one list, so that a thread with too little of a stack leaves them to the others; the caller's has been looked at.
void parallel_for(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  auto part = std::make_pair(body, context);
  const auto run = [](int64_t first, int64_t last, void* given) {
    const auto& each = *static_cast<decltype(part)*>(given);
    if (!fastattn::cpu::short_of_stack()) each.first(first, last, each.second);
  };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, 1, run, &part));
}
#endif

DType dtype_of(const Tensor& tensor) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  if (dtype == aoti_torch_dtype_bfloat16()) return fastattn::kBFloat16;
  if (dtype == aoti_torch_dtype_float16()) return fastattn::kFloat16;
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_float32(), "float32, bfloat16 or float16 is needed, got dtype number ",
                  dtype);
  return fastattn::kFloat32;
}

// Of a tensor, as it keeps them.
struct Sizes {
  int64_t dims = 0, *size = nullptr, *stride = nullptr;

  explicit Sizes(const Tensor& tensor) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor.get(), &dims));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &size));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &stride));
  }

  // Where the last number lies, counted from the first; -1 where there is none.
  int64_t last() const {
    int64_t found = 0;
    for (int64_t axis = 0; axis < dims; ++axis) {
      if (size[axis] == 0) return -1;
      found += (size[axis] - 1) * stride[axis];
    }
    return found;
  }
};

// Sizes and strides aligned at the last of four axes; an axis of size 1 repeats.
struct Shape {
  int64_t size[4] = {1, 1, 1, 1};
  int64_t stride[4] = {0, 0, 0, 0};
  int64_t last;

  explicit Shape(const Tensor& tensor) {
    const Sizes of(tensor);
    STD_TORCH_CHECK(of.dims <= 4, "a tensor of at most 4 dimensions is needed, got ", of.dims);
    for (int64_t axis = 0; axis < of.dims; ++axis) {
      size[4 - of.dims + axis] = of.size[axis];
      stride[4 - of.dims + axis] = of.size[axis] == 1 ? 0 : of.stride[axis];
    }
    last = of.last();
  }
};

// Where a tensor's numbers begin, of `bytes` each. Its memory may have been cut off since it was made (a storage's
// resize_), and then nothing of it is read.
void* begin(const Tensor& tensor, int64_t last, int64_t bytes) {
  int64_t held = 0, offset = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &held));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
  if (last >= 0 && (offset + last + 1) * bytes > held)
    throw std::runtime_error("a tensor's storage was resized after it was made, and lacks its numbers");
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor.get(), &data));
  return data;
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(begin(tensor, Sizes(tensor).last(), sizeof(T)));
}

Table table(const Tensor& tensor, const Shape& shape) {
  Table t;
  t.dtype = dtype_of(tensor);
  t.data = begin(tensor, shape.last, t.dtype == fastattn::kFloat32 ? 4 : 2);
  for (int axis = 0; axis < 4; ++axis) t.stride[axis] = shape.stride[axis];
  return t;
}

Table table(const Tensor& tensor) { return table(tensor, Shape(tensor)); }

// The pools' table: p.kv_len is the length of a block until here.
void read_pages(Params& p, const Tensor& blocks, int64_t pool_blocks) {
  const Shape shape(blocks);
  for (Table* pool : {&p.key, &p.value}) {
    pool->blocks = pointer<int32_t>(blocks);
    pool->blocks_stride = shape.stride[2];
    pool->block_size = p.kv_len;
    pool->block_count = pool_blocks;
  }
  STD_TORCH_CHECK(shape.size[3] <= 1 || shape.stride[3] == 1, "a block table with adjacent columns is needed");
  p.kv_len *= shape.size[3];
}

// Words: a term's kind pushes the next term, which takes one tensor or, for ids, two; kAnd and kOr join.
//   interval  int32 [2, batch, heads, q_len]: starts, then stops
//   elements  bool [batch, heads, q_len, kv_len]
//   ids       int64 [batch, q_len], int64 [batch, kv_len]
//   band      no tensor: two more words, low and high
//   reach     three more words: low, high, which of offset (1), first (2) and end (4) there are; int32 or int64 [batch]
// kPages, first where it is there, pushes nothing: key and value are pools, and its tensor int32 [batch, blocks] is
// their table.
Column column(const Tensor& tensor) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  const Shape shape(tensor);
  const bool wide = dtype == aoti_torch_dtype_int64();
  return {begin(tensor, shape.last, wide ? 8 : 4), wide, shape.stride[3]};
}

void read_mask(Params& p, const std::vector<int64_t>& words, const std::vector<Tensor>& tensors, int64_t pool_blocks) {
  STD_TORCH_CHECK(words.size() <= fastattn::kMostWords, "a mask of at most 64 words is needed, got ", words.size());
  size_t next = 0;
  const auto take = [&]() -> const Tensor& {
    STD_TORCH_CHECK(next < tensors.size(), "a mask's program asks for more tensors than the ", tensors.size(),
                    " given");
    return tensors[next++];
  };
  for (size_t at = 0; at < words.size(); ++at) {
    const int64_t word = words[at];
    if (word == fastattn::kPages) {
      read_pages(p, take(), pool_blocks);
      continue;
    }
    p.mask.word[p.mask.words++] = word < 0 ? static_cast<int32_t>(word) : p.mask.terms;
    if (word < 0) continue;
    STD_TORCH_CHECK(p.mask.terms < fastattn::kMostTerms, "a mask of at most 32 terms is needed");
    MaskTerm& term = p.mask.term[p.mask.terms++];
    term.kind = word == fastattn::kReach ? fastattn::kBand : static_cast<fastattn::TermKind>(word);
    if (term.kind == fastattn::kBand) {
      STD_TORCH_CHECK(at + (word == fastattn::kReach ? 3 : 2) < words.size(),
                      "a band of a mask's program lacks its ends");
      term.low = words[++at];
      term.high = words[++at];
      const int64_t columns = word == fastattn::kReach ? words[++at] : 0;
      if (columns & 1) term.offset = column(take());
      if (columns & 2) term.first = column(take());
      if (columns & 4) term.end = column(take());
      continue;
    }
    const Tensor& first = take();
    const Shape shape(first);
    if (term.kind == fastattn::kInterval) {
      term.start = pointer<int32_t>(first);
      term.stop = term.start + shape.stride[0];
      for (int axis = 0; axis < 3; ++axis) term.stride[axis] = shape.stride[axis + 1];
    } else if (term.kind == fastattn::kElements) {
      term.elements = pointer<uint8_t>(first);
      for (int axis = 0; axis < 4; ++axis) term.stride[axis] = shape.stride[axis];
    } else {
      const Tensor& second = take();
      const Shape keys(second);
      term.q_ids = pointer<int64_t>(first);
      term.kv_ids = pointer<int64_t>(second);
      term.stride[0] = shape.stride[2];
      term.stride[2] = shape.stride[3];
      term.kv_id_stride[0] = keys.stride[2];
      term.kv_id_stride[1] = keys.stride[3];
    }
  }
}

Params problem(const Tensor& query, const Tensor& key, const Tensor& value, const Maybe& bias, const Maybe& sinks,
               const Maybe& seed, const std::vector<int64_t>& words, const std::vector<Tensor>& mask_tensors,
               double scale, double softcap, double dropout_p) {
  Params p;
  const Shape q(query), k(key), v(value);
  p.batch = q.size[0];
  p.num_heads = q.size[1];
  p.q_len = q.size[2];
  p.head_dim = q.size[3];
  p.num_kv_heads = k.size[1];
  p.group = p.num_kv_heads > 0 ? p.num_heads / p.num_kv_heads : 1;
  p.kv_len = k.size[2];
  p.head_dim_v = v.size[3];
  p.dtype = dtype_of(query);
  p.query = table(query, q);
  p.key = table(key, k);
  p.value = table(value, v);
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  if (bias) {
    const Shape shape(*bias);
    p.bias = table(*bias, shape);
    for (int axis = 0; axis < 4; ++axis) p.bias_shape[axis] = shape.size[axis];
  }
  if (sinks) p.sinks = pointer<float>(*sinks);
  read_mask(p, words, mask_tensors, k.size[0]);
  if (dropout_p > 0) {
    p.drop_below = static_cast<uint64_t>(std::floor(dropout_p * 4294967296.0));
    p.keep_scale = dropout_p < 1 ? static_cast<float>(1.0 / (1.0 - dropout_p)) : 0.0f;
    p.seed_on_device = pointer<int64_t>(seed.value());
  }
  return p;
}

void check(const char* sentence) {
  if (sentence != nullptr) throw std::runtime_error(sentence);
}

#ifndef FASTATTN_CUDA_BACKEND

// A Params takes 7,000 bytes of stack, and is not copied.
void on_cpu(Params& p) {
  if (p.drop_below) p.seed = static_cast<uint64_t>(*p.seed_on_device);
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  p.threads = static_cast<int>(threads);
  p.parallel_for = threads > 1 ? parallel_for : nullptr;
}

void cpu_forward(Tensor query, Tensor key, Tensor value, Maybe bias, Maybe sinks, Maybe seed,
                 std::vector<int64_t> mask_words, std::vector<Tensor> mask_tensors, double scale, double softcap,
                 double dropout_p, Tensor out, Tensor lse, Maybe lse_low, Maybe out_low) {
  Params p = problem(query, key, value, bias, sinks, seed, mask_words, mask_tensors, scale, softcap, dropout_p);
  on_cpu(p);
  p.out = table(out);
  p.lse = pointer<float>(lse);
  if (out_low) p.out_low = table(*out_low);
  if (lse_low) p.lse_low = pointer<float>(*lse_low);
  check(fastattn::cpu::forward(p));
}

void cpu_backward(Tensor query, Tensor key, Tensor value, Maybe bias, Maybe sinks, Maybe seed,
                  std::vector<int64_t> mask_words, std::vector<Tensor> mask_tensors, double scale, double softcap,
                  double dropout_p, Tensor out, Tensor lse, Maybe lse_low, Maybe out_low, Tensor d_out, Maybe d_lse,
                  Tensor dq, Tensor dk, Tensor dv, Maybe dbias, Maybe dsinks, Tensor row_terms) {
  Params p = problem(query, key, value, bias, sinks, seed, mask_words, mask_tensors, scale, softcap, dropout_p);
  on_cpu(p);
  p.out = table(out);
  p.lse = pointer<float>(lse);
  if (out_low) p.out_low = table(*out_low);
  if (lse_low) p.lse_low = pointer<float>(*lse_low);
  p.d_out = table(d_out);
  p.dq = table(dq);
  p.dk = table(dk);
  p.dv = table(dv);
  if (d_lse) p.d_lse = pointer<float>(*d_lse);
  if (dbias) p.dbias = table(*dbias);
  if (dsinks) p.dsinks = pointer<float>(*dsinks);
  p.row_terms = pointer<float>(row_terms);
  check(fastattn::cpu::backward(p));
}

void cpu_weights(Tensor query, Tensor key, Maybe bias, Maybe sinks, std::vector<int64_t> mask_words,
                 std::vector<Tensor> mask_tensors, double scale, double softcap, Tensor lse, Maybe rows,
                 bool mean_heads, Tensor weights) {
  Params p = problem(query, key, key, bias, sinks, std::nullopt, mask_words, mask_tensors, scale, softcap, 0.0);
  on_cpu(p);
  p.lse = pointer<float>(lse);
  if (rows) {
    p.rows = pointer<int64_t>(*rows);
    p.row_count = Shape(*rows).size[3];
  }
  p.weights = table(weights);
  p.mean_heads = mean_heads;
  check(fastattn::cpu::weights(p));
}

#else

// The stream that torch has made current. Its name is looked up in the library that import torch has loaded: nothing
// here is linked against it, and a torch without CUDA has none.
void* current_stream(int32_t device) {
#ifdef FASTATTN_SIM
  return nullptr;
#else
  using Current = AOTITorchError (*)(int32_t, void**);
  static const Current current = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Current>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(current != nullptr, "the CUDA backend needs a torch with CUDA, and this one has none");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(current(device, &stream));
  return stream;
#endif
}

// Block lists (fastattn/masks/blocks.py): counts int32 [2, batch or 1, heads or 1, tiles], tiles int32 [batch or 1,
// heads or 1, tiles, key tiles].
fastattn::cuda::Lists lists_of(const Tensor& counts, const Tensor& tiles) {
  const Shape count(counts), tile(tiles);
  fastattn::cuda::Lists lists{};
  lists.counts = pointer<int32_t>(counts);
  lists.tiles = pointer<int32_t>(tiles);
  lists.to_full = count.stride[0];
  lists.row = tile.stride[2];
  for (int axis = 0; axis < 2; ++axis) {
    lists.count_stride[axis] = count.stride[axis + 1];
    lists.tile_stride[axis] = tile.stride[axis];
  }
  return lists;
}

void cuda_forward(Tensor query, Tensor key, Tensor value, Maybe bias, Maybe sinks, Maybe seed,
                  std::vector<int64_t> mask_words, std::vector<Tensor> mask_tensors, double scale, double softcap,
                  double dropout_p, int64_t variant, bool hides, Maybe list_counts, Maybe list_tiles, int64_t splits,
                  Maybe taken, Maybe parts, Maybe part_lse, Tensor out, Tensor lse) {
  fastattn::cuda::Request request;
  Params& p = request.problem;
  p = problem(query, key, value, bias, sinks, seed, mask_words, mask_tensors, scale, softcap, dropout_p);
  p.out = table(out);
  p.lse = pointer<float>(lse);
  request.variant = static_cast<fastattn::cuda::KernelVariant>(variant);
  request.hides = hides;
  if (list_counts) request.lists = lists_of(*list_counts, list_tiles.value());
  request.splits = static_cast<int32_t>(splits);
  if (taken) request.taken = pointer<int32_t>(*taken);
  if (splits > 1) {
    request.parts = pointer<float>(parts.value());
    request.part_lse = pointer<float>(part_lse.value());
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(query.get(), &request.device));
  request.stream = current_stream(request.device);
  check(fastattn::cuda::forward(request));
}

#endif

}  // namespace

#ifndef FASTATTN_CUDA_BACKEND

extern "C" {

// The instruction set that a call would use now, and all that the machine has: see cpu/dispatch.h.
__attribute__((visibility("default"))) const char* fastattn_cpu_isa() { return fastattn::cpu::isa(); }
__attribute__((visibility("default"))) const char* fastattn_cpu_isas() { return fastattn::cpu::isas(); }
}
#endif

#define FASTATTN_PROBLEM                                                                                  \
  "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? sinks, Tensor? seed, int[] mask_words, " \
  "Tensor[] mask_tensors, float scale, float softcap, float dropout_p, "

#ifdef FASTATTN_CUDA_BACKEND

// A simulator's library is told a name of its own, as several may be loaded, and takes tensors on the CPU.
#ifdef FASTATTN_SIM
#define FASTATTN_CUDA_KEY CPU
#else
#define FASTATTN_CUDA_OPERATOR "cuda_forward"
#define FASTATTN_CUDA_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn, m) {
  m.def(FASTATTN_CUDA_OPERATOR
        "(" FASTATTN_PROBLEM
        "int kind, bool hides, Tensor? list_counts, Tensor? list_tiles, int splits, Tensor(e!)? taken, "
        "Tensor(c!)? parts, Tensor(d!)? part_lse, Tensor(a!) out, Tensor(b!) lse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, FASTATTN_CUDA_KEY, m) { m.impl(FASTATTN_CUDA_OPERATOR, TORCH_BOX(&cuda_forward)); }

#else

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn, m) {
  m.def("cpu_forward(" FASTATTN_PROBLEM
        "Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? lse_low=None, "
        "Tensor(d!)? out_low=None) -> ()");
  m.def("cpu_backward(" FASTATTN_PROBLEM
        "Tensor out, Tensor lse, Tensor? lse_low, Tensor? out_low, Tensor d_out, Tensor? d_lse, Tensor(a!) dq, "
        "Tensor(b!) dk, Tensor(c!) dv, "
        "Tensor(d!)? dbias, Tensor(e!)? dsinks, Tensor(f!) row_terms) -> ()");
  m.def(
      "cpu_weights(Tensor query, Tensor key, Tensor? bias, Tensor? sinks, int[] mask_words, Tensor[] mask_tensors, "
      "float scale, float softcap, Tensor lse, Tensor? rows, bool mean_heads, Tensor(a!) weights) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&cpu_forward));
  m.impl("cpu_backward", TORCH_BOX(&cpu_backward));
  m.impl("cpu_weights", TORCH_BOX(&cpu_weights));
}

#endif
