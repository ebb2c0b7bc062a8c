// Each function of arch/numbers.h, element by element.
#include "harness.h"

namespace {

__global__ void numbers(int which, const float* in, uint32_t* out, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float x = in[i], y = in[i ^ 1];
  const auto word = __float_as_uint(x);
  switch (which) {
    case 0: out[i] = __float_as_uint(exp2_approx(x)); break;
    case 1: out[i] = __float_as_uint(log2_approx(x)); break;
    case 2: out[i] = __float_as_uint(tanh_approx(x)); break;
    case 3: out[i] = __float_as_uint(reciprocal_approx(x)); break;
    case 4: out[i] = pack<bf16>(x, y); break;
    case 5: out[i] = pack<f16>(x, y); break;
    case 6:
      out[i] = __float_as_uint(to_float(bf16{static_cast<uint16_t>(word)})) ^ __float_as_uint(unpack<bf16>(word, 1));
      break;
    case 7:
      out[i] = __float_as_uint(to_float(f16{static_cast<uint16_t>(word)})) ^ __float_as_uint(unpack<f16>(word, 1));
      break;
    case 8: out[i] = __float_as_uint(max_nan(x, y)); break;
    default: break;
  }
}

}  // namespace

EXPORT run_numbers(int which, const void* in, void* out, int count) {
  return run(numbers, static_cast<unsigned>((count + 127) / 128), 128, 0, which, static_cast<const float*>(in),
             static_cast<uint32_t*>(out), count);
}
