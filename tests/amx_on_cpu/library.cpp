// kernels_amx_bf16 for ctypes, once on the processor's tiles and once on those of tile_registers.h.
#include <immintrin.h>

#include "../../csrc/cpu/inference/amx_permission.h"
#include "../../csrc/cpu/inference/kernels.h"

using namespace ddpm_fast::inference;

extern "C" {

bool usable() { return amx_bf16_usable(); }

int64_t k_multiple() { return kernels_amx_bf16()->k_multiple; }

// Arguments as in struct Gemm.
void multiply(
    const void* const* rows, const void* a, int64_t a_stride, int64_t m, int64_t segments, int64_t k, const void* b,
    const void* next, int64_t next_bytes, int64_t panels, float* c
) {
  const Kernels* kernels = kernels_amx_bf16();
  kernels->begin();
  kernels->gemm({rows, a, a_stride, m, segments, k, b, next, next_bytes, panels, c});
  kernels->end();
}

// One instruction: c (16x16 float32) += a (16x32 bfloat16) b (16 pairs x 16 x 2 bfloat16).
void instruction(const void* a, const void* b, void* c) {
  const Kernels* kernels = kernels_amx_bf16();
  kernels->begin();
  _tile_loadd(0, c, 64);
  _tile_loadd(1, a, 64);
  _tile_loadd(2, b, 64);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, c, 64);
  kernels->end();
}

#if defined(DDPM_FAST_TILES_EMULATED)
// What a processor would refuse.
void misuse(int which) {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 8, 16};
  } configuration;
  switch (which) {
  case 0: return _tile_zero(0);
  case 1: configuration.rows[2] = 17; return _tile_loadconfig(&configuration);
  case 2: configuration.rows[8] = 1; return _tile_loadconfig(&configuration);
  default: _tile_loadconfig(&configuration);
  }
  switch (which) {
  case 3: return _tile_zero(5);
  case 4: return _tile_dpbf16ps(0, 3, 1);
  case 5: return _tile_dpbf16ps(0, 0, 1);
  default: _tile_release(); return _tile_zero(0);
  }
}
#endif

}  // extern "C"
