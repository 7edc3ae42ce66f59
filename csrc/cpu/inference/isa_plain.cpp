// float32 kernels for any machine.
#define DDPM_FAST_VECTOR_BYTES 16
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

DDPM_FAST_TABLE(plain, false, 1, nullptr, nullptr, gemm)
