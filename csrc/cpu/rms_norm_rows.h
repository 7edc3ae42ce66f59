// The loops of rms_norm_silu over the rows of a piece. A row is a run of places of one channel (contiguous) or,
// `across`, the channels of one place (channels_last). Coefficients begin at the piece's first channel and first place.
#pragma once

#include "tile.h"

namespace ddpm_fast {

struct RmsCoefficients {
  const float *weight, *beta;   // of channels
  const float *factor, *slope;  // of places: sqrt(C) / max(|h|, eps); backward: factor mean(g_x xhat), g_x = g_u weight
};

// y = act(u) + residual, u = h factor weight + beta; no residual where its v is null
void rms_normalize_rows(
    const FloatRows& h, const RmsCoefficients& c, const FloatRows& residual, const StoreRows& y, const Rows& rows,
    bool across, bool silu
);
// g_u = g act'(u), packed
void rms_activation_gradient_rows(
    const FloatRows& g, const FloatRows& h, const RmsCoefficients& c, float* g_u, const Rows& rows, bool across
);
// g_h = factor (g_x - xhat mean(g_x xhat))
void rms_pull_back_rows(
    const FloatRows& g_u, const FloatRows& h, const RmsCoefficients& c, const StoreRows& g_h, const Rows& rows,
    bool across
);

// Added to the sums of places: h^2, and g_x h. Added to those of channels: g_u xhat and g_u.
void rms_sum_squares(const FloatRows& h, double* squares, const Rows& rows, bool across);
void rms_sum_products(
    const FloatRows& g_u, const FloatRows& h, const RmsCoefficients& c, double* products, const Rows& rows, bool across
);
void rms_sum_gradients(
    const FloatRows& g_u, const FloatRows& h, const RmsCoefficients& c, double* const* sums, const Rows& rows,
    bool across
);

}  // namespace ddpm_fast
