// bfloat16 kernels for AMX, with AVX512-BF16 for everything around the matrix products.
#define DDPM_FAST_VECTOR_BYTES 64
#define DDPM_FAST_HALF 1
#include "vector.h"
// vector.h first
#include "attend.h"
#include "attend_linear.h"
#include "gemm_amx.h"
#include "normalise.h"
#include "pixel_norm.h"
#include "table.h"
#include "transforms.h"

DDPM_FAST_TABLE(amx_bf16, true, kTileK, begin_tiles, end_tiles, gemm_tiles)
