// A fiber: a stack of its own, and the one switch between two of them (x86-64, System V).
#pragma once

#include <cstddef>

namespace fastattn::sim {

class Fiber {
 public:
  Fiber() = default;  // the one that runs already: main
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next switch to this fiber calls `entry`, which must never return. The stack is made once.
  void start(void (*entry)());

  // Goes on in `next`; comes back when somebody switches to this one. `last`: never comes back.
  void switch_to(Fiber& next, bool last = false);

  // What `entry` calls first: AddressSanitizer wants to hear that the stack has changed.
  static void entered(Fiber& main);

 private:
  void* stack_pointer_ = nullptr;
  char* stack_ = nullptr;
  size_t stack_bytes_ = 0;
  bool owned_ = false;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

}  // namespace fastattn::sim
