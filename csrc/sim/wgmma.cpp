// wgmma: products of a warpgroup, in flight from their issue to the wait for their batch.
//
// While a chain of products is in flight its accumulator registers hold a poison, NaN: who reads them gets NaN, and who
// has written them is told at the wait. Products happen at their issue, at the wait or at any turn between.
#include <cstring>
#include <limits>

#include "descriptor.h"
#include "fragments.h"
#include "instructions.h"
#include "machine.h"
#include "numbers.h"
#include "wgmma_state.h"

namespace fastattn::sim {

namespace {

constexpr int kM = 64, kK = 16, kMostN = 256;
constexpr uint32_t kPiece = 16;
constexpr uint32_t kPoison = 0x7fbadbad;  // a NaN that no arithmetic makes

struct Call {
  int n;
  bool bf16;
  float* d;
  const uint32_t* a;
  uint64_t a_at, b_at;
  bool a_mn_major, b_mn_major, accumulate;

  bool same(const Call& other) const {
    return n == other.n && bf16 == other.bf16 && (a == nullptr) == (other.a == nullptr) && a_at == other.a_at &&
           b_at == other.b_at && a_mn_major == other.a_mn_major && b_mn_major == other.b_mn_major &&
           accumulate == other.accumulate;
  }
};

const Call& call_of(const Team& team, int thread) {
  return *static_cast<const Call*>(team.arguments[static_cast<size_t>(thread)]);
}

// Where register i of a thread lies in [64, n].
size_t element(int thread, int i, int n) {
  const Place at = accumulator(thread, i);
  return static_cast<size_t>(at.row * n + at.column);
}

// Each 16-byte piece of an operand that is `mns` wide: its address, first mn and first k.
template <class Visit>
void pieces(const Descriptor& at, bool mn_major, uint32_t mns, Visit visit) {
  if (mn_major) {
    for (uint32_t k = 0; k < kK; ++k) {
      for (uint32_t piece = 0; piece < mns / 8; ++piece) visit(at.mn_major(k, piece), piece * 8, k);
    }
  } else {
    for (uint32_t mn = 0; mn < mns; ++mn) {
      for (uint32_t piece = 0; piece < kK / 8; ++piece) visit(at.k_major(mn, piece), mn, piece * 8);
    }
  }
}

void gather(const Block& block, uint64_t bits, bool mn_major, uint32_t mns, bool bf16, float* to, uint32_t mn_step,
            uint32_t k_step) {
  const Descriptor at(bits);
  pieces(at, mn_major, mns, [&](uint32_t address, uint32_t mn, uint32_t k) {
    uint16_t halves[8];
    std::memcpy(halves, block.shared.begin() + shared_offset(address), sizeof halves);
    for (uint32_t each = 0; each < 8; ++each) {
      const uint32_t at_mn = mn + (mn_major ? each : 0), at_k = k + (mn_major ? 0 : each);
      to[at_mn * mn_step + at_k * k_step] = from_half(halves[each], bf16);
    }
  });
}

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__)
__attribute__((target_clones("avx2,fma", "default")))
#endif
void multiply(float* sums, const float* a, const float* b, int n) {
  for (int m = 0; m < kM; ++m) {
    float* row = sums + m * n;
    for (int k = 0; k < kK; ++k) {
      const float factor = a[m * kK + k];
      for (int column = 0; column < n; ++column) row[column] += factor * b[k * n + column];
    }
  }
}

void perform(const Block& block, Product& product) {
  if (product.performed) return;
  product.performed = true;
  static float a[kM * kK], b[kK * kMostN];
  if (product.a_in_registers) {
    for (int thread = 0; thread < kWarpgroupSize; ++thread) {
      for (int i = 0; i < 8; ++i) {
        const Place at = a_fragment(thread, i);
        const auto half = static_cast<uint16_t>(product.a[thread][i / 2] >> (16 * (i % 2)));
        a[at.row * kK + at.column] = from_half(half, product.bf16);
      }
    }
  } else {
    gather(block, product.a_at, product.a_mn_major, kM, product.bf16, a, kK, 1);
  }
  const auto n = static_cast<uint32_t>(product.n);
  gather(block, product.b_at, product.b_mn_major, n, product.bf16, b, 1, n);
  if (!product.accumulate) std::fill(product.sums->sums.begin(), product.sums->sums.end(), 0.0f);
  multiply(product.sums->sums.data(), a, b, product.n);
}

void perform_all(const Block& block, Warpgroup& group) {
  for (auto& batch : group.batches) {
    for (auto& product : batch) perform(block, *product);
  }
  for (auto& product : group.open) perform(block, *product);
}

// Bounds of an operand, and its accesses: by all threads of the warpgroup, so what they all have seen counts.
void look(Block& block, uint64_t bits, bool mn_major, uint32_t mns, const Team& team, Stamp stamp) {
  const Descriptor at(bits);
  if (!at.valid) fail("a descriptor with a base offset, or with bits that the format leaves out");
  if (!at.aligned()) {
    fail("misaligned: the descriptor's start, " + std::to_string(at.start) +
         ", is not in the first row of a pattern of " + std::to_string(8 * swizzle_span(at.mode)) +
         " bytes, and has no base offset");
  }
  Knowledge common;
  Thread* lacking = &self();
  if (machine->options.checks) {
    common = block.threads[static_cast<size_t>(team.first)].knows;
    for (int each = 1; each < team.size; ++each) {
      const Knowledge& other = block.threads[static_cast<size_t>(team.first + each)].knows;
      for (size_t actor = 0; actor < common.seen.size(); ++actor) {
        common.seen[actor] = std::min(common.seen[actor], other.seen[actor]);
        common.fenced[actor] = std::min(common.fenced[actor], other.fenced[actor]);
      }
    }
  }
  pieces(at, mn_major, mns, [&](uint32_t address, uint32_t, uint32_t) {
    shared_bytes_at(block, address, kPiece, kPiece);
    engine_access(*lacking, address, kPiece, kRead | kAsync, stamp, common);
  });
}

std::shared_ptr<Accumulator> accumulator_of(Warpgroup& group, const Team& team, const Call& first) {
  std::shared_ptr<Accumulator> found;
  const auto search = [&](const std::vector<std::shared_ptr<Product>>& products) {
    for (const auto& each : products) {
      if (each->sums->registers[0] == first.d) found = each->sums;
    }
  };
  for (const auto& batch : group.batches) search(batch);
  search(group.open);
  if (found != nullptr) {
    if (found->n != first.n) fail("the accumulator is in flight in a product of another n");
    for (int thread = 0; thread < kWarpgroupSize; ++thread) {
      if (call_of(team, thread).d != found->registers[thread]) fail("the accumulator is partly in flight");
    }
    return found;
  }
  auto made = std::make_shared<Accumulator>();
  made->n = first.n;
  made->sums.resize(static_cast<size_t>(kM) * static_cast<size_t>(first.n));
  for (int thread = 0; thread < kWarpgroupSize; ++thread) {
    float* d = made->registers[thread] = call_of(team, thread).d;
    for (int i = 0; i < first.n / 2; ++i) {
      made->sums[element(thread, i, first.n)] = d[i];
      std::memcpy(d + i, &kPoison, sizeof kPoison);
    }
  }
  return made;
}

void issue(Block& block, Team& team) {
  Warpgroup& group = warpgroup_of(block, team);
  const Call& first = call_of(team, 0);
  for (int thread = 1; thread < kWarpgroupSize; ++thread) {
    if (!call_of(team, thread).same(first)) {
      fail("divergence: threads of the warpgroup have different operands (thread " +
           std::to_string(team.first + thread) + " and thread " + std::to_string(team.first) + ")");
    }
  }
  if (first.n < 8 || first.n > kMostN || first.n % 8 != 0) {
    fail("an n of " + std::to_string(first.n) + ": 8 to 256, in eights");
  }
  if (!group.fenced) fail("missing wgmma_fence: none since the last commit, and registers may have changed");
  auto product = std::make_shared<Product>();
  product->n = first.n;
  product->bf16 = first.bf16;
  product->accumulate = first.accumulate;
  product->a_in_registers = first.a != nullptr;
  product->a_mn_major = first.a_mn_major;
  product->b_mn_major = first.b_mn_major;
  product->a_at = first.a_at;
  product->b_at = first.b_at;
  product->stamp = new_stamp(block);
  if (product->a_in_registers) {
    for (int thread = 0; thread < kWarpgroupSize; ++thread) {
      product->a_registers[thread] = call_of(team, thread).a;
      std::memcpy(product->a[thread], product->a_registers[thread], sizeof product->a[thread]);
    }
  } else {
    look(block, product->a_at, product->a_mn_major, kM, team, product->stamp);
  }
  look(block, product->b_at, product->b_mn_major, static_cast<uint32_t>(product->n), team, product->stamp);
  product->sums = accumulator_of(group, team, first);
  ++product->sums->products;
  group.open.push_back(product);
  if (machine->lands_early()) perform_all(block, group);
}

// The product is over: once its chain is, the registers get their sums.
void retire(const Block& block, Product& product) {
  perform(block, product);
  for (int thread = 0; product.a_in_registers && thread < kWarpgroupSize; ++thread) {
    if (std::memcmp(product.a[thread], product.a_registers[thread], sizeof product.a[thread]) != 0) {
      fail("the A registers of a wgmma changed while it was in flight, in thread " + std::to_string(thread) +
           " of the warpgroup: they must live until the wait");
    }
  }
  Accumulator& sums = *product.sums;
  if (--sums.products != 0) return;
  for (int thread = 0; thread < kWarpgroupSize; ++thread) {
    for (int i = 0; i < sums.n / 2; ++i) {
      float* d = sums.registers[thread] + i;
      if (std::memcmp(d, &kPoison, sizeof kPoison) != 0) {
        fail("accumulator register " + std::to_string(i) + " of thread " + std::to_string(thread) +
             " of the warpgroup was written while a wgmma was in flight");
      }
      *d = sums.sums[element(thread, i, sums.n)];
    }
  }
}

struct Wait {
  int pending;
};

}  // namespace

void wgmma_fence() {
  together(own_warpgroup("wgmma.fence"), "wgmma.fence", nullptr,
           [](Block& block, Team& team) { warpgroup_of(block, team).fenced = true; });
}

void wgmma(int n, bool bf16, float* d, const uint32_t* a, uint64_t a_at, bool a_mn_major, uint64_t b_at,
           bool b_mn_major, bool accumulate) {
  Call own{n, bf16, d, a, a_at, b_at, a_mn_major, b_mn_major, accumulate};
  together(own_warpgroup("wgmma.mma_async"), "wgmma.mma_async", &own, issue);
}

void wgmma_commit() {
  together(own_warpgroup("wgmma.commit_group"), "wgmma.commit_group", nullptr, [](Block& block, Team& team) {
    Warpgroup& group = warpgroup_of(block, team);
    group.batches.push_back(std::move(group.open));
    group.open.clear();
    group.fenced = false;
  });
}

void wgmma_wait(int pending) {
  Wait own{pending};
  together(own_warpgroup("wgmma.wait_group"), "wgmma.wait_group", &own, [](Block& block, Team& team) {
    Warpgroup& group = warpgroup_of(block, team);
    const int most = static_cast<Wait*>(team.arguments[0])->pending;
    while (static_cast<int>(group.batches.size()) > most) {
      for (auto& product : group.batches.front()) {
        retire(block, *product);
        for (int each = 0; each < team.size; ++each) {
          see(block.threads[static_cast<size_t>(team.first + each)], product->stamp);
        }
      }
      group.batches.erase(group.batches.begin());
    }
  });
}

}  // namespace fastattn::sim
