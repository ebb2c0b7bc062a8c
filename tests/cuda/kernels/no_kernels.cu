// Launches that do nothing, in place of forward.cu: what is left of a call is the host's part.
#include "../../../csrc/cuda/dispatch.h"

namespace fastattn::cuda {

template <class T, int WIDTH, int WIDTH_V>
const char* launch_forward(KernelVariant, const ForwardArgs&, const arch::Launch&) {
  return nullptr;
}

#define NOTHING(WIDTH, WIDTH_V)                                                                      \
  template const char* launch_forward<arch::bf16, WIDTH, WIDTH_V>(KernelVariant, const ForwardArgs&, \
                                                                  const arch::Launch&);              \
  template const char* launch_forward<arch::f16, WIDTH, WIDTH_V>(KernelVariant, const ForwardArgs&,  \
                                                                 const arch::Launch&);

NOTHING(64, 64)
NOTHING(96, 96)
NOTHING(128, 128)
NOTHING(192, 128)
NOTHING(192, 192)
NOTHING(256, 256)

}  // namespace fastattn::cuda
