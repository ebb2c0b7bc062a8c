// Memory of one worker, kept for its next call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "../common/params.h"

namespace fastattn::FASTATTN_ISA {

class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  // Forget what was handed out, and hold at least `bytes`. False: there is no such memory.
  bool reset(size_t bytes) {
    used_ = 0;
    bytes = (bytes + kAlign - 1) / kAlign * kAlign;
    if (bytes <= size_) return true;
    std::free(memory_);
    memory_ = static_cast<char*>(std::aligned_alloc(kAlign, bytes));
    size_ = memory_ ? bytes : 0;
    return memory_ != nullptr;
  }

  // Give memory back where it is more than `bytes`.
  void keep(size_t bytes) {
    if (size_ <= bytes) return;
    std::free(memory_);
    memory_ = nullptr;
    size_ = 0;
  }

  template <class T>
  T* take(int64_t count) {
    T* at = reinterpret_cast<T*>(memory_ + used_);
    used_ += bytes_for<T>(count);
    return at;
  }

  template <class T>
  static size_t bytes_for(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
  }

 private:
  static constexpr size_t kAlign = 64;
  char* memory_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

}  // namespace fastattn::FASTATTN_ISA
