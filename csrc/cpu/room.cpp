// Which instruction set runs a problem.
#include "room.h"

#include <cstdlib>
#include <cstring>
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

struct Room {
  const char* name;
  Pass forward, backward, weights;
  bool here;
};

#define FASTATTN_ROOM(name, isa, here) {name, isa::forward, isa::backward, isa::weights, here}

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
const Room* rooms(int* count) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  static const bool has_amx = has_bf16 && has_tiles();
  static const Room all[] = {FASTATTN_ROOM("generic", generic, true), FASTATTN_ROOM("avx2", avx2, has_avx2),
                             FASTATTN_ROOM("avx512", avx512, has_avx512 && !has_bf16),
                             FASTATTN_ROOM("avx512", avx512bf16, has_bf16), FASTATTN_ROOM("amx", amx, has_amx)};
#else
  static const Room all[] = {FASTATTN_ROOM("generic", generic, true)};
#endif
  *count = sizeof all / sizeof *all;
  return all;
}

// Null where the one that is asked for is not here.
const Room* chosen() {
  int count;
  const Room* all = rooms(&count);
  const char* asked = std::getenv("FASTATTN_CPU_ISA");
  const Room* best = nullptr;
  for (int n = 0; n < count; ++n)
    if (all[n].here && (!asked || !*asked || std::strcmp(asked, all[n].name) == 0)) best = all + n;
  return best;
}

// A cap above it bends no score, and what is divided by it may be too small for a float.
constexpr float kWideCap = 1e30f;

const char* run(Pass Room::*pass, const Params& p) {
  const Room* room = chosen();
  if (!room)
    return "FASTATTN_CPU_ISA: it must name an instruction set that this machine has (generic, and on x86-64 avx2, "
           "avx512, amx), or be empty for the best one";
  if (p.softcap > kWideCap) {
    Params uncapped = p;
    uncapped.softcap = 0.0f;
    return (room->*pass)(uncapped);
  }
  return (room->*pass)(p);
}

}  // namespace

const char* forward(const Params& p) { return run(&Room::forward, p); }
const char* backward(const Params& p) { return run(&Room::backward, p); }
const char* weights(const Params& p) { return run(&Room::weights, p); }

const char* isa() {
  const Room* room = chosen();
  return room ? room->name : "none";
}

const char* isas() {
  static char names[64];
  static const bool written = [] {
    int count;
    const Room* all = rooms(&count);
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
