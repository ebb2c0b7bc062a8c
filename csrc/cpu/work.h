// Items of work spread over threads. An item's result does not depend on who runs it, nor when.
#pragma once

#include <atomic>
#if defined(__SSE__)
#include <immintrin.h>
#endif

#if defined(FASTATTN_AMX)
#include "amx.h"
#endif
#include "scratch.h"

namespace fastattn::FASTATTN_ISA {

constexpr size_t KEPT_BYTES = size_t{4} << 20;  // of a thread's scratch, between calls

// Denormals are zeros while this lives: they cost hundreds of cycles each.
class FlushDenormals {
 public:
#if defined(__SSE__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FlushDenormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    __asm__ volatile("msr fpcr, %0" : : "r"(before_ | (uint64_t{1} << 24)));
  }
  ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#else
  FlushDenormals() {}
#endif
};

// Runs work(item, scratch) for each item in [0, items), in about that order; `work` gives false for want of memory.
template <class Work>
static bool run_items(const Params& p, int64_t items, const Work& work) {
  struct Shared {
    const Work* work;
    int64_t items;
    std::atomic<int64_t> next;
    std::atomic<bool> failed;
  } shared{&work, items, {0}, {false}};
  const auto body = [](int64_t first, int64_t last, void* context) {
    Shared& all = *static_cast<Shared*>(context);
    if (first >= last) return;
    static thread_local Scratch scratch;
    const FlushDenormals flush;
#if defined(FASTATTN_AMX)
    const ShapedTiles shaped;
#endif
    for (int64_t item; (item = all.next.fetch_add(1, std::memory_order_relaxed)) < all.items;)
      if (!(*all.work)(item, scratch)) all.failed.store(true, std::memory_order_relaxed);
    scratch.keep(KEPT_BYTES);
  };
  if (items <= 0) return true;
  const int64_t threads = p.threads < items ? p.threads : items;
  if (threads > 1 && p.parallel_for)
    p.parallel_for(threads, body, &shared);
  else
    body(0, 1, &shared);
  return !shared.failed.load();
}

constexpr const char* NO_MEMORY = "the CPU kernels found no memory for their scratch space; a smaller batch needs less";

}  // namespace fastattn::FASTATTN_ISA
