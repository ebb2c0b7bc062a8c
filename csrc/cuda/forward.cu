// The forward kernels of one dtype and one width, which the build names.
#include "forward.h"

#include "room.h"

#if !defined(FASTATTN_T) || !defined(FASTATTN_WIDTH) || !defined(FASTATTN_WIDTH_V)
#error "FASTATTN_T (bf16 or f16), FASTATTN_WIDTH and FASTATTN_WIDTH_V say which kernels"
#endif

namespace fastattn::cuda {

template <class F>
static const char* launch_kind(const ForwardArgs& args, arch::Launch how) {
  how.threads = F::THREADS;
  how.shared_bytes = sizeof(Shared<F>);
  static_assert(sizeof(Shared<F>) <= 227 * 1024, "a block has 227 KiB of shared memory");
  return arch::launch(forward_kernel<F>, how, args);
}

template <class T, int WIDTH, int WIDTH_V>
const char* launch_forward(Kind kind, const ForwardArgs& args, const arch::Launch& how) {
  if (kind == kPlain) return launch_kind<Forward<T, WIDTH, WIDTH_V, kPlain>>(args, how);
  if (kind == kMasked) return launch_kind<Forward<T, WIDTH, WIDTH_V, kMasked>>(args, how);
  return launch_kind<Forward<T, WIDTH, WIDTH_V, kEverything>>(args, how);
}

template const char* launch_forward<arch::FASTATTN_T, FASTATTN_WIDTH, FASTATTN_WIDTH_V>(Kind, const ForwardArgs&,
                                                                                         const arch::Launch&);

}  // namespace fastattn::cuda
