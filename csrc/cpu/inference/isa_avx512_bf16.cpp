// bfloat16 kernels for AVX512-BF16.
#define DDPM_FAST_VECTOR_BYTES 64
#define DDPM_FAST_HALF 1
#include "vector.h"
// vector.h first
#include "gemm_bf16.h"
#include "transforms.h"

namespace ddpm_fast::inference {

const Kernels* kernels_avx512_bf16() {
  static const Kernels table = {
      "avx512_bf16",
      true,
      2,
      nullptr,
      nullptr,
      gemm_pairs,
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
