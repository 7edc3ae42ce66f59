// The loops of rms_norm_silu over rows, compiled once per instruction set.
//
// As for group_norm_silu, statistics are sums, so no bits are promised here and multiply-adds are fused.
#include "rms_norm_rows.h"

#include "row_sums.h"
#include "silu_rows.h"

namespace ddpm_fast {
namespace {

// weight, beta, factor and slope of the element in row r, column i.
template <bool kAcross>
struct At {
  const RmsCoefficients& c;
  DDPM_FAST_HD int64_t channel(int64_t r, int64_t i) const { return kAcross ? i : r; }
  DDPM_FAST_HD int64_t place(int64_t r, int64_t i) const { return kAcross ? r : i; }
  DDPM_FAST_HD float u(float h, int64_t r, int64_t i) const {
    const int64_t k = channel(r, i);
    return h * c.factor[place(r, i)] * c.weight[k] + c.beta[k];
  }
};

template <bool kAcross, bool kSilu, bool kAdds>
DDPM_FAST_HD void normalize(
    const FloatRows& h, const RmsCoefficients& c, const FloatRows& residual, const StoreRows& y, const Rows& rows
) {
  const At<kAcross> at{c};
  for (int64_t r = 0; r < rows.count; ++r) {
    const float *in = h.v + r * h.stride, *added = kAdds ? residual.v + r * residual.stride : nullptr;
    float* __restrict__ out = y.v + r * y.stride;
    for (int64_t i = 0; i < rows.length; ++i) {
      const float u = at.u(in[i], r, i), activated = kSilu ? silu_of(u) : u;
      out[i] = kAdds ? activated + added[i] : activated;
    }
  }
}

template <bool kAcross, bool kSilu>
DDPM_FAST_HD void normalize(
    const FloatRows& h, const RmsCoefficients& c, const FloatRows& residual, const StoreRows& y, const Rows& rows
) {
  residual.v != nullptr ? normalize<kAcross, kSilu, true>(h, c, residual, y, rows)
                        : normalize<kAcross, kSilu, false>(h, c, residual, y, rows);
}

template <bool kAcross>
DDPM_FAST_HD void
activation_gradient(const FloatRows& g, const FloatRows& h, const RmsCoefficients& c, float* g_u, const Rows& rows) {
  const At<kAcross> at{c};
  for (int64_t r = 0; r < rows.count; ++r) {
    const float *in = h.v + r * h.stride, *g_y = g.v + r * g.stride;
    float* __restrict__ out = g_u + r * rows.length;
    for (int64_t i = 0; i < rows.length; ++i)
      out[i] = g_y[i] * silu_gradient_of(at.u(in[i], r, i));
  }
}

template <bool kAcross>
DDPM_FAST_HD void
pull_back(const FloatRows& g_u, const FloatRows& h, const RmsCoefficients& c, const StoreRows& g_h, const Rows& rows) {
  const At<kAcross> at{c};
  for (int64_t r = 0; r < rows.count; ++r) {
    const float *in = h.v + r * h.stride, *g = g_u.v + r * g_u.stride;
    float* __restrict__ out = g_h.v + r * g_h.stride;
    for (int64_t i = 0; i < rows.length; ++i) {
      const int64_t p = at.place(r, i);
      out[i] = c.factor[p] * (g[i] * c.weight[at.channel(r, i)] - in[i] * c.slope[p]);
    }
  }
}

// What row_sums.h sums of each element.
struct Squares {
  static constexpr int kSums = 1;
  FloatRows h;
  template <int kLanes>
  DDPM_FAST_HD void add(float* to, int64_t r, int64_t i, int64_t) const {
    const float v = h.v[r * h.stride + i];
    to[0] += v * v;
  }
};
template <bool kAcross>
struct Products {  // g_x h
  static constexpr int kSums = 1;
  FloatRows g_u, h;
  At<kAcross> at;
  template <int kLanes>
  DDPM_FAST_HD void add(float* to, int64_t r, int64_t i, int64_t) const {
    to[0] += g_u.v[r * g_u.stride + i] * at.c.weight[at.channel(r, i)] * h.v[r * h.stride + i];
  }
};
template <bool kAcross>
struct Gradients {  // g_u xhat and g_u
  static constexpr int kSums = 2;
  FloatRows g_u, h;
  At<kAcross> at;
  template <int kLanes>
  DDPM_FAST_HD void add(float* to, int64_t r, int64_t i, int64_t) const {
    const float g = g_u.v[r * g_u.stride + i];
    to[0] += g * (h.v[r * h.stride + i] * at.c.factor[at.place(r, i)]);
    to[kLanes] += g;
  }
};

}  // namespace

// ---- the loops above, once per instruction set ----

DDPM_FAST_CLONES void rms_normalize_rows(
    const FloatRows& h, const RmsCoefficients& c, const FloatRows& residual, const StoreRows& y, const Rows& rows,
    bool across, bool silu
) {
  if (across)
    silu ? normalize<true, true>(h, c, residual, y, rows) : normalize<true, false>(h, c, residual, y, rows);
  else
    silu ? normalize<false, true>(h, c, residual, y, rows) : normalize<false, false>(h, c, residual, y, rows);
}

DDPM_FAST_CLONES void rms_activation_gradient_rows(
    const FloatRows& g, const FloatRows& h, const RmsCoefficients& c, float* g_u, const Rows& rows, bool across
) {
  across ? activation_gradient<true>(g, h, c, g_u, rows) : activation_gradient<false>(g, h, c, g_u, rows);
}

DDPM_FAST_CLONES void rms_pull_back_rows(
    const FloatRows& g_u, const FloatRows& h, const RmsCoefficients& c, const StoreRows& g_h, const Rows& rows,
    bool across
) {
  across ? pull_back<true>(g_u, h, c, g_h, rows) : pull_back<false>(g_u, h, c, g_h, rows);
}

DDPM_FAST_CLONES void rms_sum_squares(const FloatRows& h, double* squares, const Rows& rows, bool across) {
  sum_rows(Squares{h}, &squares, rows, !across);
}

DDPM_FAST_CLONES void rms_sum_products(
    const FloatRows& g_u, const FloatRows& h, const RmsCoefficients& c, double* products, const Rows& rows, bool across
) {
  if (across)
    sum_rows(Products<true>{g_u, h, {c}}, &products, rows, false);
  else
    sum_rows(Products<false>{g_u, h, {c}}, &products, rows, true);
}

DDPM_FAST_CLONES void rms_sum_gradients(
    const FloatRows& g_u, const FloatRows& h, const RmsCoefficients& c, double* const* sums, const Rows& rows,
    bool across
) {
  if (across)
    sum_rows(Gradients<true>{g_u, h, {c}}, sums, rows, true);
  else
    sum_rows(Gradients<false>{g_u, h, {c}}, sums, rows, false);
}

}  // namespace ddpm_fast
