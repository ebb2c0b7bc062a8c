// The forward kernels of one dtype and one width, which the build names.
#include "forward.h"

#include "dispatch.h"

#if !defined(FASTATTN_T) || !defined(FASTATTN_WIDTH) || !defined(FASTATTN_WIDTH_V)
#error "FASTATTN_T (bf16 or f16), FASTATTN_WIDTH and FASTATTN_WIDTH_V say which kernels"
#endif

namespace fastattn::cuda {

template <class F>
static const char* launch_variant(const ForwardArgs& args, arch::Launch how) {
  how.threads = F::THREADS;
  how.shared_bytes = sizeof(Shared<F>);
  static_assert(sizeof(Shared<F>) <= 227 * 1024, "a block has 227 KiB of shared memory");
  return arch::launch(forward_kernel<F>, how, args);
}

template <class T, int WIDTH, int WIDTH_V>
const char* launch_forward(KernelVariant variant, const ForwardArgs& args, const arch::Launch& how) {
  if (variant == kPlain) return launch_variant<Forward<T, WIDTH, WIDTH_V, kPlain>>(args, how);
  if (variant == kMasked) return launch_variant<Forward<T, WIDTH, WIDTH_V, kMasked>>(args, how);
  return launch_variant<Forward<T, WIDTH, WIDTH_V, kGeneral>>(args, how);
}

template const char* launch_forward<arch::FASTATTN_T, FASTATTN_WIDTH, FASTATTN_WIDTH_V>(KernelVariant,
                                                                                        const ForwardArgs&,
                                                                                        const arch::Launch&);

}  // namespace fastattn::cuda
