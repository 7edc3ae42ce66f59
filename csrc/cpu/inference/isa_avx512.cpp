// float32 kernels for AVX512.
#define DDPM_FAST_VECTOR_BYTES 64
#define DDPM_FAST_HALF 0
#include "vector.h"
// vector.h first
#include "gemm_f32.h"
#include "transforms.h"

namespace ddpm_fast::inference {

const Kernels* kernels_avx512() {
  static const Kernels table = {
      "avx512",
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
