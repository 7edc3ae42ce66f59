// The float32 matrix product for any register width. Included by isa_*.cpp only, after vector.h.
//
// A micro-tile of MR rows and NR registers of columns stays in registers over all of k; the weights of a group stream
// past it once per MR rows.
#pragma once

#include "kernels.h"
#include "rest.h"

namespace {

using ddpm_fast::inference::Gemm;
using ddpm_fast::inference::kGroupPanels;
using ddpm_fast::inference::kPanel;

template <int MR, int NR>
void micro(const Gemm& g, int64_t row, int64_t column) {
  const int64_t width = g.panels * kPanel;
  Register sum[MR][NR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j)
      sum[i][j] = splat_register(0.0f);
  const float* b = static_cast<const float*>(g.b) + column;
  for (int64_t s = 0; s < g.segments; ++s) {
    const float* a[MR];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
      a[i] = g.rows != nullptr ? static_cast<const float*>(g.rows[s * g.m + row + i])
                               : static_cast<const float*>(g.a) + (row + i) * g.a_stride;
    for (int64_t k = 0; k < g.k; ++k, b += width) {
      Register weights[NR];
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j)
        weights[j] = load_register(b + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const Register x = splat_register(a[i][k]);
#pragma GCC unroll 4
        for (int j = 0; j < NR; ++j)
          sum[i][j] += x * weights[j];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j)
      store_register(g.c + (row + i) * width + column + j * kLanes, sum[i][j]);
}

// All rows of one strip of columns: as many full micro-tiles as fit, then one of what is left.
template <int MR, int NR>
void strip(const Gemm& g, int64_t column) {
  int64_t row = 0;
  for (; row + MR <= g.m; row += MR)
    micro<MR, NR>(g, row, column);
  with_rest<MR>(g.m - row, [&](auto rest) { micro<decltype(rest)::value, NR>(g, row, column); });
}

void gemm(const Gemm& g) {
#if DDPM_FAST_VECTOR_BYTES == 64
  switch (g.panels) {
  case 1: return strip<12, 1>(g, 0);
  case 2: return strip<12, 2>(g, 0);
  case 3: return strip<8, 3>(g, 0);
  default: return strip<6, 4>(g, 0);
  }
#elif DDPM_FAST_VECTOR_BYTES == 32
  for (int64_t column = 0; column < g.panels * kPanel; column += 2 * kLanes)
    strip<6, 2>(g, column);  // 12 sums, 2 weights, 1 factor of 16 registers
#else
  for (int64_t column = 0; column < g.panels * kPanel; column += 2 * kLanes)
    strip<6, 2>(g, column);
#endif
}

}  // namespace
