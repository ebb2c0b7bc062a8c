// From a problem to launches: how it is cut, what the kernels are told, which of them run.
#include "dispatch.h"

#include <cmath>
#include <cstdio>

#include "merge.h"

namespace fastattn::cuda {
namespace {

constexpr int64_t kCacheBytes = 32 << 20;  // of L2 for the keys and values of an L2 group
constexpr double kBusy = 0.8;              // share of the multiprocessors that makes splitting not worth its merge
constexpr double kNearBest = 0.85;
constexpr int64_t kLeastTiles = 4;  // of keys, below which they are not split
constexpr int32_t kMostSplits = 128;
constexpr float kWideCap = 1e30f;     // a cap above it bends no score
constexpr int64_t kSectorFloats = 8;  // 32 bytes: what memory is written in
constexpr int64_t kRowBytes = 16;     // what TMA wants addresses and strides to be multiples of

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t common_divisor(int64_t a, int64_t b) { return b == 0 ? a : common_divisor(b, a % b); }

thread_local char said[800];

const char* refuse(const char* what, const char* why, const Request& request) {
  const Params& p = request.problem;
  const auto number = [](int64_t n) { return static_cast<long long>(n); };
  std::snprintf(
      said, sizeof said,
      "%s: %s (device %d, %s, variant %d, splits %d, batch %lld, num_heads %lld, num_kv_heads %lld, q_len %lld, "
      "kv_len %lld, head_dim %lld, head_dim_v %lld, blocks of %lld keys)",
      what, why, request.device, p.dtype == kBFloat16 ? "bfloat16" : "float16", request.variant, request.splits,
      number(p.batch), number(p.num_heads), number(p.num_kv_heads), number(p.q_len), number(p.kv_len),
      number(p.head_dim), number(p.head_dim_v), number(p.key.blocks ? p.key.block_size : 0));
  return said;
}

// The smallest number of splits that keeps nearly as many multiprocessors busy as the best one does.
int32_t choose_splits(int64_t tiles, int64_t key_tiles, int32_t multiprocessors) {
  if (tiles <= 0 || tiles >= kBusy * multiprocessors || key_tiles <= kLeastTiles) return 1;
  int64_t most = key_tiles < multiprocessors ? key_tiles : multiprocessors;
  most = most < kMostSplits ? most : kMostSplits;
  const auto efficiency = [&](int64_t splits) {
    const double waves = static_cast<double>(tiles * splits) / multiprocessors;
    return waves / std::ceil(waves);
  };
  double best = 0.0;
  for (int64_t splits = 1; splits <= most; ++splits) best = std::fmax(best, efficiency(splits));
  int64_t splits = 1;
  while (efficiency(splits) < kNearBest * best) ++splits;
  return static_cast<int32_t>(splits);
}

// A tensor in boxes of 64 columns; `step` gets 0 for each of batch (or blocks) and heads that repeats. Null, or why
// not.
const char* describe(arch::TensorMap* map, const Table& table, int64_t columns, int64_t rows, int64_t heads,
                     int64_t batch, int32_t box_rows, int32_t (&step)[2]) {
  arch::TensorShape shape;
  shape.element = table.dtype == kBFloat16 ? arch::Element::kBFloat16 : arch::Element::kFloat16;
  shape.rank = 4;
  const int64_t size[3] = {rows, heads, batch}, stride[3] = {table.stride[2], table.stride[1], table.stride[0]};
  shape.extent[0] = columns;
  shape.box[0] = 64;
  shape.box[1] = box_rows;
  for (int axis = 0; axis < 3; ++axis) {
    const bool repeats = stride[axis] == 0 || size[axis] == 1;
    shape.extent[axis + 1] = repeats ? 1 : size[axis];
    shape.stride[axis + 1] = repeats ? kRowBytes : 2 * stride[axis];
    if (axis > 0) step[2 - axis] = repeats ? 0 : 1;
  }
  return arch::encode_tensor_map(map, table.data, shape);
}

// The queries, whose heads are split in key heads and their groups.
const char* describe_queries(ForwardArgs& a, const Params& p) {
  arch::TensorShape shape;
  shape.element = p.dtype == kBFloat16 ? arch::Element::kBFloat16 : arch::Element::kFloat16;
  shape.rank = 5;
  const int64_t* stride = p.query.stride;
  const int64_t size[4] = {p.q_len, p.group, p.num_kv_heads, p.batch};
  const int64_t step[4] = {stride[2], stride[1], stride[1] * p.group, stride[0]};
  shape.extent[0] = p.head_dim;
  shape.box[0] = 64;
  shape.box[1] = a.tile_rows;
  shape.box[2] = a.tile_heads;
  for (int axis = 0; axis < 4; ++axis) {
    const bool single = size[axis] == 1 || (axis == 3 && step[axis] == 0);
    shape.extent[axis + 1] = single ? 1 : size[axis];
    shape.stride[axis + 1] = single ? kRowBytes : 2 * step[axis];
  }
  a.query_step = p.batch > 1 && stride[0] != 0;
  return arch::encode_tensor_map(&a.query, p.query.data, shape);
}

bool is_near(const Column& column) { return column.stride * 8 <= INT32_MAX && column.stride * 8 >= INT32_MIN; }

Interval interval_of(const MaskTerm& term) {
  Interval interval{};
  if (term.kind == kBand) {
    interval.low = static_cast<int32_t>(term.low);
    interval.high = static_cast<int32_t>(term.high);
    const Column* columns[3] = {&term.offset, &term.first, &term.end};
    for (int n = 0; n < 3; ++n)
      interval.column[n] = {static_cast<const char*>(columns[n]->data),
                            static_cast<int32_t>(columns[n]->stride * (columns[n]->wide ? 8 : 4)), columns[n]->wide};
  } else {
    interval.start = term.start;
    interval.stop = term.stop;
    for (int axis = 0; axis < 3; ++axis) interval.stride[axis] = term.stride[axis];
  }
  return interval;
}

const char* take_mask(ForwardArgs& a, const Request& request) {
  const MaskProgram& mask = request.problem.mask;
  a.listed = request.lists.counts != nullptr;
  if (a.listed) {
    if (mask.terms > kMostProgramTerms || mask.words > kMostProgramWords) return "the mask has too many terms";
    a.lists = request.lists;
    a.program.words = mask.words;
    for (int n = 0; n < mask.words; ++n) a.program.word[n] = mask.word[n];
    for (int n = 0; n < mask.terms; ++n) a.program.term[n] = mask.term[n];
    return nullptr;
  }
  a.terms = mask.terms;
  if (mask.terms > 2 || (mask.terms == 2 && mask.word[2] != kOr)) return "the mask is not one or two intervals a query";
  for (int n = 0; n < mask.terms; ++n) {
    if (mask.term[n].kind != kInterval && mask.term[n].kind != kBand) return "the mask has no intervals";
    if (!is_near(mask.term[n].offset) || !is_near(mask.term[n].first) || !is_near(mask.term[n].end))
      return "the mask's numbers of each batch item lie too far apart";
    a.interval[n] = interval_of(mask.term[n]);
  }
  if (mask.terms == 0 && request.variant != kPlain) {  // everything, as an interval
    a.terms = 1;
    a.interval[0].low = -kUnbounded;
    a.interval[0].high = kUnbounded;
  }
  return nullptr;
}

const char* fill(ForwardArgs& a, const Request& request, const Plan& cut) {
  const Params& p = request.problem;
  a.batch = p.batch;
  a.num_heads = p.num_heads;
  a.num_kv_heads = p.num_kv_heads;
  a.group = p.group;
  a.q_len = p.q_len;
  a.kv_len = p.kv_len;
  a.head_dim_v = p.head_dim_v;
  a.tile_heads = cut.tile_heads;
  a.tile_rows = cut.tile_rows;
  a.q_tiles = ceil_div(p.q_len, cut.tile_rows);
  a.unit_heads = ceil_div(p.group, cut.tile_heads);
  a.splits = request.splits;
  a.taken = request.taken;
  const int64_t units = p.batch * p.num_kv_heads * a.unit_heads, programs = units * a.q_tiles * a.splits;
  if (programs > INT32_MAX / 2) return "there are too many tiles";
  a.programs = static_cast<int32_t>(programs);
  const int64_t bytes = 2 * p.kv_len * (p.head_dim + p.head_dim_v), fit = kCacheBytes / bytes;
  const int64_t l2_group = (fit < 1 ? 1 : fit) * a.unit_heads;
  a.l2_group = static_cast<int32_t>(l2_group < units ? l2_group : units);
  const bool natural = request.variant == kGeneral;
  a.scale = p.scale;
  a.factor = natural ? kLog2e : p.scale * kLog2e;
  a.lowest = natural ? -kLargest : fmaxf(-kLargest, -kLargestPower / a.factor);
  a.softcap = p.softcap > kWideCap ? 0.0f : p.softcap;
  if (!natural && (!(p.scale > 0.0f) || a.softcap != 0.0f || p.bias.data || p.drop_below))
    return "bias, soft cap, dropout or such a scale have another kernel variant";
  a.hides = request.hides;
  a.bias = p.bias;
  a.sinks = p.sinks;
  a.drops = p.drop_below != 0;
  a.drops_all = p.drop_below > UINT32_MAX;
  a.drop_below = static_cast<uint32_t>(p.drop_below);
  a.keep_scale = p.keep_scale;
  a.seed = p.seed_on_device;
  a.out = p.out.data;
  a.out_aligned = reinterpret_cast<uintptr_t>(p.out.data) % kRowBytes == 0;
  for (int axis = 0; axis < 3; ++axis) {
    a.out_stride[axis] = p.out.stride[axis];
    a.out_aligned = a.out_aligned && 2 * p.out.stride[axis] % kRowBytes == 0;
  }
  a.parts = request.splits > 1 ? request.parts : nullptr;
  a.part_step = cut.part_step;
  a.lse = request.splits > 1 ? request.part_lse : p.lse;
  if (const char* why = take_mask(a, request)) return why;
  if (const char* why = describe_queries(a, p)) return why;
  int64_t rows = p.kv_len, items = p.batch;
  int32_t box_rows = cut.tile.block_n;
  if (p.key.blocks) {
    if (request.variant == kPlain) return "keys in blocks have another kernel variant";
    rows = p.key.block_size;
    items = p.key.block_count;
    if (rows > INT32_MAX || items > INT32_MAX) return "a block is too long, or they are too many";
    box_rows = static_cast<int32_t>(common_divisor(rows, box_rows));
    a.pages = {p.key.blocks, p.key.blocks_stride, static_cast<int32_t>(rows), static_cast<int32_t>(items), box_rows};
  }
  const char* why = describe(&a.key, p.key, p.head_dim, rows, p.num_kv_heads, items, box_rows, a.key_step);
  return why ? why : describe(&a.value, p.value, p.head_dim_v, rows, p.num_kv_heads, items, box_rows, a.value_step);
}

template <class T>
const char* launch_width(int32_t width, KernelVariant variant, const ForwardArgs& args, const arch::Launch& how) {
  switch (width) {
    case 0: return launch_forward<T, 64, 64>(variant, args, how);
    case 1: return launch_forward<T, 96, 96>(variant, args, how);
    case 2: return launch_forward<T, 128, 128>(variant, args, how);
    case 3: return launch_forward<T, 192, 128>(variant, args, how);
    case 4: return launch_forward<T, 192, 192>(variant, args, how);
    default: return launch_forward<T, 256, 256>(variant, args, how);
  }
}

}  // namespace

Plan plan(const Params& p, KernelVariant variant, bool by_head, int32_t multiprocessors) {
  Plan cut{};
  cut.width = width_index(p.head_dim, p.head_dim_v);
  if (cut.width < 0) return cut;
  cut.tile = tile_size(kWidths[cut.width][0], kWidths[cut.width][1], variant);
  cut.part_step = static_cast<int32_t>(ceil_div(p.head_dim_v, kSectorFloats) * kSectorFloats);
  cut.tile_heads = 1;
  cut.tile_rows = cut.tile.block_m;
  if (p.group > 1 && !by_head && p.q_len > 0 && 2 * p.q_len <= cut.tile.block_m) {  // heads of a group share a tile
    const int64_t fit = cut.tile.block_m / p.q_len;
    cut.tile_heads = static_cast<int32_t>(fit < p.group ? fit : p.group);
    cut.tile_rows = static_cast<int32_t>(p.q_len);
  }
  const int64_t units = p.batch * p.num_kv_heads * ceil_div(p.group, cut.tile_heads);
  const int64_t tiles = units * ceil_div(p.q_len, cut.tile_rows);
  cut.splits = choose_splits(tiles, ceil_div(p.kv_len, cut.tile.block_n), multiprocessors);
  cut.counts = variant != kPlain && tiles * cut.splits > multiprocessors;
  return cut;
}

const char* forward(const Request& request) {
  const Params& p = request.problem;
#ifndef FASTATTN_SIM
  const arch::OnDevice on(request.device);
  if (on.refused) return refuse("the CUDA forward cannot use its device", on.refused, request);
#endif
  if (p.batch * p.num_heads * p.q_len == 0) return nullptr;
  if (p.kv_len == 0) return refuse("the CUDA forward", "there are no keys", request);
  const bool listed = request.lists.counts != nullptr;
  bool by_head = listed;
  for (int n = 0; n < p.mask.terms; ++n) by_head = by_head || p.mask.term[n].stride[1] != 0;
  const int32_t here = multiprocessors(request.device);
  if (here < 1) return refuse("the CUDA forward", "the device names no multiprocessors", request);
  const Plan cut = plan(p, request.variant, by_head, here);
  if (cut.width < 0) return refuse("the CUDA forward", "no kernel is that wide", request);
  ForwardArgs args{};
  if (const char* why = fill(args, request, cut)) return refuse("the CUDA forward", why, request);
  arch::Launch how;
  // Tiles that may differ and have no counter get a block each, whatever number of blocks the caller planned for.
  const bool alone = request.variant != kPlain && !args.taken;
  args.blocks = args.programs < here || alone ? args.programs : here;
  how.grid = dim3(args.blocks);
  how.stream = request.stream;
  const char* why = p.dtype == kBFloat16 ? launch_width<arch::bf16>(cut.width, request.variant, args, how)
                                         : launch_width<arch::f16>(cut.width, request.variant, args, how);
  if (why) return refuse("the CUDA forward", why, request);
  if (request.splits == 1) return nullptr;
  MergeArgs merged{};
  merged.parts = request.parts;
  merged.part_lse = request.part_lse;
  merged.sinks = p.sinks;
  merged.out = p.out.data;
  for (int axis = 0; axis < 3; ++axis) merged.out_stride[axis] = p.out.stride[axis];
  merged.lse = p.lse;
  merged.rows = p.batch * p.num_heads * p.q_len;
  merged.splits = request.splits;
  merged.num_heads = p.num_heads;
  merged.q_len = p.q_len;
  merged.head_dim_v = p.head_dim_v;
  merged.part_step = cut.part_step;
  arch::Launch merge;
  merge.grid = dim3(static_cast<unsigned>(ceil_div(merged.rows, kMergeRows)));
  merge.threads = kMergeThreads;
  merge.stream = request.stream;
  why = p.dtype == kBFloat16 ? arch::launch(merge_kernel<arch::bf16>, merge, merged)
                             : arch::launch(merge_kernel<arch::f16>, merge, merged);
  return why ? refuse("the CUDA merge", why, request) : nullptr;
}

#ifdef FASTATTN_SIM

// As many as a test wants: small problems meet persistence and splits too.
static int32_t simulated = 4;
int32_t multiprocessors(int32_t) { return simulated; }

#else

int32_t multiprocessors(int32_t device) {
  constexpr int kMostDevices = 64;
  static int32_t known[kMostDevices];
  const bool keeps = device >= 0 && device < kMostDevices;
  if (keeps && known[device]) return known[device];
  int count = 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    cudaGetLastError();  // not sticky: the next call does not report it again
    return 0;
  }
  if (keeps) known[device] = count;
  return count;
}

#endif

}  // namespace fastattn::cuda

#define FASTATTN_EXPORT extern "C" __attribute__((visibility("default")))

// For the host's side in Python: block_m, block_n, splits, whether a counter is wanted and part_step into `cut`; 1
// where there is such a kernel, else 0.
FASTATTN_EXPORT int fastattn_cuda_plan(const int64_t* sizes, int32_t variant, int32_t by_head, int32_t multiprocessors,
                                       int32_t* cut) {
  fastattn::Params p;
  p.batch = sizes[0];
  p.num_heads = sizes[1];
  p.num_kv_heads = sizes[2];
  p.group = p.num_kv_heads > 0 ? p.num_heads / p.num_kv_heads : 1;
  p.q_len = sizes[3];
  p.kv_len = sizes[4];
  p.head_dim = sizes[5];
  p.head_dim_v = sizes[6];
  const fastattn::cuda::Plan plan =
      fastattn::cuda::plan(p, static_cast<fastattn::cuda::KernelVariant>(variant), by_head != 0, multiprocessors);
  cut[0] = plan.tile.block_m;
  cut[1] = plan.tile.block_n;
  cut[2] = plan.splits;
  cut[3] = plan.counts;
  cut[4] = plan.part_step;
  return plan.width >= 0;
}

FASTATTN_EXPORT int32_t fastattn_cuda_multiprocessors(int32_t device) {
  return fastattn::cuda::multiprocessors(device);
}
#ifdef FASTATTN_SIM
FASTATTN_EXPORT void fastattn_cuda_simulate(int32_t multiprocessors) { fastattn::cuda::simulated = multiprocessors; }
#endif
