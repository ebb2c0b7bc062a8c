#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what a call must keep, takes the other stack, restores.
extern "C" void fastattn_sim_switch(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
.text
.hidden fastattn_sim_switch
.globl fastattn_sim_switch
.type fastattn_sim_switch, @function
fastattn_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastattn_sim_switch, .-fastattn_sim_switch
)");
#else
#error "the simulator switches stacks on x86-64 alone"
#endif

namespace fastattn::sim {

namespace {

constexpr size_t kStack = 256 << 10;  // bytes; only the pages that are touched cost memory

}  // namespace

Fiber::~Fiber() {
  if (!owned_) return;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, stack_bytes_);  // somebody else will have these addresses
#endif
  munmap(stack_, stack_bytes_);
}

void Fiber::start(void (*entry)()) {
  if (stack_ == nullptr) {
    stack_bytes_ = kStack;
    void* memory =
        mmap(nullptr, stack_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stack_ = static_cast<char*>(memory);
    owned_ = true;
    mprotect(stack_, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);  // a stack too small crashes here
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, stack_bytes_);  // the frames of the kernel before never returned
#endif
  char* top = stack_ + stack_bytes_ - 64;
  void** frame = reinterpret_cast<void**>(top);
  *--frame = nullptr;  // the entry's return address
  *--frame = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--frame = nullptr;
  stack_pointer_ = frame;
}

void Fiber::switch_to(Fiber& next, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, next.stack_, next.stack_bytes_);
#endif
  fastattn_sim_switch(&stack_pointer_, next.stack_pointer_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::entered([[maybe_unused]] Fiber& main) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (main.stack_ == nullptr) {  // the first fiber of all is entered from main
    main.stack_ = const_cast<char*>(static_cast<const char*>(bottom));
    main.stack_bytes_ = bytes;
  }
#endif
}

}  // namespace fastattn::sim
