// bfloat16 kernels for AVX512-BF16.
#define DDPM_FAST_VECTOR_BYTES 64
#define DDPM_FAST_HALF 1
#include "vector.h"
// vector.h first
#include "attend.h"
#include "attend_linear.h"
#include "gemm_bf16.h"
#include "normalise.h"
#include "pixel_norm.h"
#include "table.h"
#include "transforms.h"

DDPM_FAST_TABLE(avx512_bf16, true, 2, nullptr, nullptr, gemm_pairs)
