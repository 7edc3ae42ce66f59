// float32 kernels for any machine.
#define DDPM_FAST_VECTOR_BYTES 16
#define DDPM_FAST_HALF 0
#include "vector.h"
// vector.h first
#include "gemm_f32.h"
#include "transforms.h"

namespace ddpm_fast::inference {

const Kernels* kernels_plain() {
  static const Kernels table = {
      "plain",
      false,
      1,
      nullptr,
      nullptr,
      gemm,
      winograd_in,
      window_in,
      finish<WinogradOut>,
      finish<WindowOut>,
      finish<DirectOut>,
      store_rows,
      to_float,
  };
  return &table;
}

}  // namespace ddpm_fast::inference
