// float32 kernels for AVX2.
#define DDPM_FAST_VECTOR_BYTES 32
#define DDPM_FAST_HALF 0
#include "vector.h"
// vector.h first
#include "attend.h"
#include "attend_linear.h"
#include "gemm_f32.h"
#include "normalise.h"
#include "pixel_norm.h"
#include "table.h"
#include "transforms.h"

DDPM_FAST_TABLE(avx2, false, 1, nullptr, nullptr, gemm)
