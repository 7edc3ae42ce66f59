// The loops of group_norm_silu over the rows of a piece. A row is a run of one channel (contiguous) or, `across`, the
// channels of one place (channels_last); coefficients and sums are indexed by row or, across, by column.
#pragma once

#include "tile.h"

namespace ddpm_fast {

struct Coefficients {
  const float *offset, *scale, *beta;
  const float *base, *slope;  // backward: rstd mean(g_x) and rstd^2 mean(g_x xhat) over the group, g_x = g_u weight
};

// y = act(u), u = (h - offset) scale + beta
void normalize_rows(
    const FloatRows& h, const Coefficients& c, const StoreRows& y, const Rows& rows, bool across, bool silu
);
// g_u = g act'(u), packed
void activation_gradient_rows(
    const FloatRows& g, const FloatRows& h, const Coefficients& c, float* g_u, const Rows& rows, bool across
);
// g_h = rstd (g_x - mean(g_x) - xhat mean(g_x xhat))
void pull_back_rows(
    const FloatRows& g_u, const FloatRows& h, const Coefficients& c, const StoreRows& g_h, const Rows& rows, bool across
);

// For each of `inner` elements of a channel: v = h + added[c], or values[c]. All packed.
void add_to_channels(const float* h, const float* added, int64_t channels, int64_t inner, float* v);
void repeat_for_channels(const float* values, int64_t channels, int64_t inner, float* out);

// Added to sums[k][row or column]: sums of h; of h - shift and its square; of g_u, g_u d and d with d = h - offset.
void sum_values(const FloatRows& h, double* const* sums, const Rows& rows, bool across);
void sum_moments(const FloatRows& h, const float* shift, double* const* sums, const Rows& rows, bool across);
void sum_gradients(
    const FloatRows& g_u, const FloatRows& h, const float* offset, double* const* sums, const Rows& rows, bool across
);

}  // namespace ddpm_fast
