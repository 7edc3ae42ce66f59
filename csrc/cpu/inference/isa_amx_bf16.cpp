// bfloat16 kernels for AMX, with AVX512-BF16 for everything around the matrix products.
#define DDPM_FAST_VECTOR_BYTES 64
#define DDPM_FAST_HALF 1
#include "vector.h"
// vector.h first
#include "gemm_amx.h"
#include "transforms.h"

namespace ddpm_fast::inference {

const Kernels* kernels_amx_bf16() {
  static const Kernels table = {
      "amx_bf16",        true,        kTileK,    begin_tiles,         end_tiles,
      gemm_tiles,        winograd_in, window_in, finish<WinogradOut>, finish<WindowOut>,
      finish<DirectOut>, store_rows,  to_float,
  };
  return &table;
}

}  // namespace ddpm_fast::inference
