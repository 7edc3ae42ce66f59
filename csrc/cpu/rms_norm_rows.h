// The loops of rms_norm_silu over the rows of a piece. A row is a run of places of one channel (contiguous) or, across,
// the channels of one place (channels_last). Coefficients begin at the piece's first channel and first place.
#pragma once

#include "image_rows.h"

namespace ddpm_fast {

// What images hold: bfloat16 (half) or float32. Across, h lies where it was given, otherwise it is packed as float32.
struct RmsKind {
  bool across, silu, half;
};

struct RmsCoefficients {
  const float *weight, *beta;   // of channels
  const float *factor, *slope;  // of places: sqrt(C) / max(|h|, eps); backward: factor mean(g_x xhat), g_x = g_u weight
};

// y = act(u) + residual, u = h factor weight + beta; no residual where its v is null
void rms_normalize_rows(
    const RmsKind& kind, const ImageRows& h, const RmsCoefficients& c, const ImageRows& residual, const OutputRows& y,
    const Rows& rows
);
// g_u = g act'(u), packed
void rms_activation_gradient_rows(
    const RmsKind& kind, const ImageRows& g, const ImageRows& h, const RmsCoefficients& c, float* g_u, const Rows& rows
);
// g_h = factor (g_x - xhat mean(g_x xhat))
void rms_pull_back_rows(
    const RmsKind& kind, const FloatRows& g_u, const ImageRows& h, const RmsCoefficients& c, const OutputRows& g_h,
    const Rows& rows
);

// Added to the sums of places: h^2, and g_x h. Added to those of channels: g_u xhat and g_u.
void rms_sum_squares(const RmsKind& kind, const ImageRows& h, double* squares, const Rows& rows);
void rms_sum_products(
    const RmsKind& kind, const FloatRows& g_u, const ImageRows& h, const RmsCoefficients& c, double* products,
    const Rows& rows
);
void rms_sum_gradients(
    const RmsKind& kind, const FloatRows& g_u, const ImageRows& h, const RmsCoefficients& c, double* const* sums,
    const Rows& rows
);

}  // namespace ddpm_fast
