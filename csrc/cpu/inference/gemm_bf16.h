// The bfloat16 matrix product of AVX512-BF16: vdpbf16ps multiplies pairs and adds both products to a float32 sum.
// Included by isa_avx512_bf16.cpp only, after vector.h.
#pragma once

#include "kernels.h"
#include "rest.h"

namespace {

using ddpm_fast::inference::Gemm;
using ddpm_fast::inference::kPanel;

template <int MR, int NP>
void micro(const Gemm& g, int64_t row) {
  __m512 sum[MR][NP];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NP; ++j)
      sum[i][j] = _mm512_setzero_ps();
  const BFloat16* b = static_cast<const BFloat16*>(g.b);
  for (int64_t s = 0; s < g.segments; ++s) {
    const BFloat16* a[MR];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
      a[i] = g.rows != nullptr ? static_cast<const BFloat16*>(g.rows[s * g.m + row + i])
                               : static_cast<const BFloat16*>(g.a) + (row + i) * g.a_stride;
    for (int64_t k = 0; k < g.k; k += 2, b += 2 * NP * kPanel) {
      __m512bh weights[NP];
#pragma GCC unroll 4
      for (int j = 0; j < NP; ++j)
        weights[j] = (__m512bh)_mm512_loadu_si512(b + 2 * j * kPanel);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        int32_t pair;
        std::memcpy(&pair, a[i] + k, sizeof pair);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int j = 0; j < NP; ++j)
          sum[i][j] = _mm512_dpbf16_ps(sum[i][j], x, weights[j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NP; ++j)
      _mm512_storeu_ps(g.c + (row + i) * NP * kPanel + j * kPanel, sum[i][j]);
}

template <int MR, int NP>
void strip(const Gemm& g) {
  // The next group of weights is asked for in equal shares, one with each micro-tile.
  const int64_t tiles = (g.m + MR - 1) / MR;
  const int64_t share = g.next != nullptr ? (g.next_bytes / 64 + tiles - 1) / tiles * 64 : 0;
  const char* next = static_cast<const char*>(g.next);
  const char* end = next + g.next_bytes;
  int64_t row = 0;
  for (; row + MR <= g.m; row += MR) {
    for (int64_t i = 0; i < share && next < end; i += 64, next += 64)
      _mm_prefetch(next, _MM_HINT_T1);
    micro<MR, NP>(g, row);
  }
  with_rest<MR>(g.m - row, [&](auto rest) { micro<decltype(rest)::value, NP>(g, row); });
}

void gemm_pairs(const Gemm& g) {
  switch (g.panels) {
  case 1: return strip<12, 1>(g);
  case 2: return strip<12, 2>(g);
  case 3: return strip<8, 3>(g);
  default: return strip<6, 4>(g);
  }
}

}  // namespace
