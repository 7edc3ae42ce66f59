// The loops of batch_norm_silu over the rows of a piece. A row is a run of one channel (contiguous) or, across, the
// channels of one place (channels_last); coefficients and sums are indexed by row or, across, by column.
#pragma once

#include "image_rows.h"

namespace ddpm_fast {

// What images hold: bfloat16 (half) or float32.
struct BatchKind {
  bool across, silu, half;
};

struct BatchCoefficients {
  const float *offset, *scale, *beta, *temb;  // mean, rstd weight, bias; the sample's temb, or null
  const float *base, *slope;  // backward: scale mean(g_u) and scale rstd^2 mean(g_u d) over the channel, d = h - offset
};

// y = act(u) + temb, u = (h - offset) scale + beta
void batch_normalize_rows(
    const BatchKind& kind, const ImageRows& h, const BatchCoefficients& c, const OutputRows& y, const Rows& rows
);
// g_u = g act'(u), packed
void batch_activation_gradient_rows(
    const BatchKind& kind, const ImageRows& g, const ImageRows& h, const BatchCoefficients& c, float* g_u,
    const Rows& rows
);
// g_h = g_u scale - (base + d slope)
void batch_pull_back_rows(
    const BatchKind& kind, const FloatRows& g_u, const ImageRows& h, const BatchCoefficients& c, const OutputRows& g_h,
    const Rows& rows
);

// Added to sums[k][row or column]: h; h - shift and its square; g_u and g_u d; g.
void batch_sum_values(const BatchKind& kind, const ImageRows& h, double* const* sums, const Rows& rows);
void batch_sum_moments(
    const BatchKind& kind, const ImageRows& h, const float* shift, double* const* sums, const Rows& rows
);
void batch_sum_gradients(
    const BatchKind& kind, const FloatRows& g_u, const ImageRows& h, const float* offset, double* const* sums,
    const Rows& rows
);

}  // namespace ddpm_fast
