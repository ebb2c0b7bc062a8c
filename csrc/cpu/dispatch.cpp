// Which instruction set runs a problem.
#include "dispatch.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__linux__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastattn {

#define FASTATTN_DECLARE(isa)          \
  namespace isa {                      \
  const char* forward(const Params&);  \
  const char* backward(const Params&); \
  const char* weights(const Params&);  \
  }
FASTATTN_DECLARE(generic)
#if defined(__x86_64__)
FASTATTN_DECLARE(avx2)
FASTATTN_DECLARE(avx512)
FASTATTN_DECLARE(avx512bf16)
FASTATTN_DECLARE(amx)
#endif
#undef FASTATTN_DECLARE

namespace cpu {
namespace {

using Pass = const char* (*)(const Params&);

struct InstructionSet {
  const char* name;
  Pass forward, backward, weights;
  bool here;
};

#define FASTATTN_ENTRY(name, isa, here) {name, isa::forward, isa::backward, isa::weights, here}

#if defined(__x86_64__)
// AMX with bfloat16: the processor has it, the system saves its tiles, and lets this process use them.
bool has_tiles() {
#if defined(FASTATTN_EMULATE_AMX)
  return true;
#elif defined(__linux__)
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx >> 22 & 1) || !(edx >> 24 & 1)) return false;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl's, of the Linux kernel's x86/xstate page
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Worst first. Two share a name: a machine has the better one or not.
const InstructionSet* instruction_sets(int* count) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  static const bool has_amx = has_bf16 && has_tiles();
  static const InstructionSet all[] = {FASTATTN_ENTRY("generic", generic, true), FASTATTN_ENTRY("avx2", avx2, has_avx2),
                                       FASTATTN_ENTRY("avx512", avx512, has_avx512 && !has_bf16),
                                       FASTATTN_ENTRY("avx512", avx512bf16, has_bf16),
                                       FASTATTN_ENTRY("amx", amx, has_amx)};
#else
  static const InstructionSet all[] = {FASTATTN_ENTRY("generic", generic, true)};
#endif
  *count = sizeof all / sizeof *all;
  return all;
}

// Null where the one that is asked for is not here.
const InstructionSet* chosen() {
  int count;
  const InstructionSet* all = instruction_sets(&count);
  const char* asked = std::getenv("FASTATTN_CPU_ISA");
  const InstructionSet* best = nullptr;
  for (int n = 0; n < count; ++n)
    if (all[n].here && (!asked || !*asked || std::strcmp(asked, all[n].name) == 0)) best = all + n;
  return best;
}

// A cap above it bends no score, and what is divided by it may be too small for a float.
constexpr float kWideCap = 1e30f;

// Apart, as its frame holds 7,000 bytes.
[[gnu::noinline]] const char* uncapped(Pass pass, const Params& p) {
  Params without = p;
  without.softcap = 0.0f;
  return pass(without);
}

// Bytes. The deepest of the kernels' calls takes 20,000, by -fstack-usage at -O3; an error's way out needs some too.
constexpr uintptr_t kStack = 32768;

// The lowest address of this thread's stack, and the address beyond; 0 and 0 where nobody says.
struct Stack {
  uintptr_t low = 0, high = 0;

  Stack() {
#if defined(__linux__)
    pthread_attr_t attributes;
    void* address = nullptr;
    size_t size = 0, guard = 0;
    if (pthread_getattr_np(pthread_self(), &attributes) != 0) return;
    if (pthread_attr_getstack(&attributes, &address, &size) == 0 &&
        pthread_attr_getguardsize(&attributes, &guard) == 0) {
      low = reinterpret_cast<uintptr_t>(address) + guard;
      high = reinterpret_cast<uintptr_t>(address) + size;
    }
    pthread_attr_destroy(&attributes);
#elif defined(__APPLE__)
    high = reinterpret_cast<uintptr_t>(pthread_get_stackaddr_np(pthread_self()));
    low = high - pthread_get_stacksize_np(pthread_self());
#endif
  }
};

const char* run(Pass InstructionSet::* pass, const Params& p) {
  if (short_of_stack())
    return "this thread has less than 32,768 bytes of stack left, which the CPU kernels may take; give it more "
           "(threading.stack_size), or call from another thread";
  const InstructionSet* set = chosen();
  if (!set)
    return "FASTATTN_CPU_ISA: it must name an instruction set that this machine has (generic, and on x86-64 avx2, "
           "avx512, amx), or be empty for the best one";
  return p.softcap > kWideCap ? uncapped(set->*pass, p) : (set->*pass)(p);
}

}  // namespace

bool short_of_stack() {
  static thread_local const Stack stack;
  const uintptr_t here = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  return here > stack.low && here < stack.high && here - stack.low < kStack;  // else it runs on a stack of its own
}

const char* forward(const Params& p) { return run(&InstructionSet::forward, p); }
const char* backward(const Params& p) { return run(&InstructionSet::backward, p); }
const char* weights(const Params& p) { return run(&InstructionSet::weights, p); }

const char* isa() {
  const InstructionSet* set = chosen();
  return set ? set->name : "none";
}

const char* isas() {
  static char names[64];
  static const bool written = [] {
    int count;
    const InstructionSet* all = instruction_sets(&count);
    for (int n = 0; n < count; ++n) {
      if (!all[n].here) continue;
      if (*names) std::strcat(names, " ");
      std::strcat(names, all[n].name);
    }
    return true;
  }();
  return written ? names : "";
}

}  // namespace cpu
}  // namespace fastattn
