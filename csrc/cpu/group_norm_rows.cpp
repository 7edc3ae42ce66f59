// The loops of group_norm_silu over rows, compiled once per instruction set.
//
// Statistics are sums, so no bits are promised here: multiply-adds are fused (CMakeLists.txt), and SiLU leaves out what
// only matters below 1e-36.
#include "group_norm_rows.h"

#include "row_sums.h"
#include "silu_rows.h"

namespace ddpm_fast {
namespace {

template <bool kAcross, bool kSilu>
DDPM_FAST_HD void normalize(const FloatRows& h, const Coefficients& c, const StoreRows& y, const Rows& rows) {
  for (int64_t r = 0; r < rows.count; ++r) {
    const float* in = h.v + r * h.stride;
    float* __restrict__ out = y.v + r * y.stride;
    for (int64_t i = 0; i < rows.length; ++i) {
      const int64_t k = kAcross ? i : r;
      const float u = (in[i] - c.offset[k]) * c.scale[k] + c.beta[k];
      out[i] = kSilu ? silu_of(u) : u;
    }
  }
}

template <bool kAcross>
DDPM_FAST_HD void
activation_gradient(const FloatRows& g, const FloatRows& h, const Coefficients& c, float* g_u, const Rows& rows) {
  for (int64_t r = 0; r < rows.count; ++r) {
    const float *in = h.v + r * h.stride, *g_y = g.v + r * g.stride;
    float* __restrict__ out = g_u + r * rows.length;
    for (int64_t i = 0; i < rows.length; ++i) {
      const int64_t k = kAcross ? i : r;
      out[i] = g_y[i] * silu_gradient_of((in[i] - c.offset[k]) * c.scale[k] + c.beta[k]);
    }
  }
}

template <bool kAcross>
DDPM_FAST_HD void
pull_back(const FloatRows& g_u, const FloatRows& h, const Coefficients& c, const StoreRows& g_h, const Rows& rows) {
  for (int64_t r = 0; r < rows.count; ++r) {
    const float *in = h.v + r * h.stride, *g = g_u.v + r * g_u.stride;
    float* __restrict__ out = g_h.v + r * g_h.stride;
    for (int64_t i = 0; i < rows.length; ++i) {
      const int64_t k = kAcross ? i : r;
      out[i] = g[i] * c.scale[k] - (c.base[k] + (in[i] - c.offset[k]) * c.slope[k]);
    }
  }
}

// ---- sums ----

// What row_sums.h sums of each element.
struct Values {  // h
  static constexpr int kSums = 1;
  FloatRows h;
  template <int kLanes>
  DDPM_FAST_HD void add(float* to, int64_t r, int64_t i, int64_t) const {
    to[0] += h.v[r * h.stride + i];
  }
};
struct Moments {  // of h about a value near its mean
  static constexpr int kSums = 2;
  FloatRows h;
  const float* shift;
  template <int kLanes>
  DDPM_FAST_HD void add(float* to, int64_t r, int64_t i, int64_t k) const {
    const float d = h.v[r * h.stride + i] - shift[k];
    to[0] += d;
    to[kLanes] += d * d;
  }
};
struct GradientSums {  // g_u, g_u d and d, with d = h - offset
  static constexpr int kSums = 3;
  FloatRows g_u, h;
  const float* offset;
  template <int kLanes>
  DDPM_FAST_HD void add(float* to, int64_t r, int64_t i, int64_t k) const {
    const float g = g_u.v[r * g_u.stride + i], d = h.v[r * h.stride + i] - offset[k];
    to[0] += g;
    to[kLanes] += g * d;
    to[2 * kLanes] += d;
  }
};

}  // namespace

// ---- the loops above, once per instruction set ----

DDPM_FAST_CLONES void normalize_rows(
    const FloatRows& h, const Coefficients& c, const StoreRows& y, const Rows& rows, bool across, bool silu
) {
  if (across && silu) return normalize<true, true>(h, c, y, rows);
  if (across) return normalize<true, false>(h, c, y, rows);
  if (silu) return normalize<false, true>(h, c, y, rows);
  normalize<false, false>(h, c, y, rows);
}

DDPM_FAST_CLONES void activation_gradient_rows(
    const FloatRows& g, const FloatRows& h, const Coefficients& c, float* g_u, const Rows& rows, bool across
) {
  across ? activation_gradient<true>(g, h, c, g_u, rows) : activation_gradient<false>(g, h, c, g_u, rows);
}

DDPM_FAST_CLONES void pull_back_rows(
    const FloatRows& g_u, const FloatRows& h, const Coefficients& c, const StoreRows& g_h, const Rows& rows, bool across
) {
  across ? pull_back<true>(g_u, h, c, g_h, rows) : pull_back<false>(g_u, h, c, g_h, rows);
}

DDPM_FAST_CLONES void
add_to_channels(const float* h, const float* added, int64_t channels, int64_t inner, float* __restrict__ v) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < inner; ++i)
      v[c * inner + i] = h[c * inner + i] + added[c];
  }
}

DDPM_FAST_CLONES void
repeat_for_channels(const float* values, int64_t channels, int64_t inner, float* __restrict__ out) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < inner; ++i)
      out[c * inner + i] = values[c];
  }
}

DDPM_FAST_CLONES void sum_values(const FloatRows& h, double* const* sums, const Rows& rows, bool across) {
  sum_rows(Values{h}, sums, rows, across);
}

DDPM_FAST_CLONES void
sum_moments(const FloatRows& h, const float* shift, double* const* sums, const Rows& rows, bool across) {
  sum_rows(Moments{h, shift}, sums, rows, across);
}

DDPM_FAST_CLONES void sum_gradients(
    const FloatRows& g_u, const FloatRows& h, const float* offset, double* const* sums, const Rows& rows, bool across
) {
  sum_rows(GradientSums{g_u, h, offset}, sums, rows, across);
}

}  // namespace ddpm_fast
