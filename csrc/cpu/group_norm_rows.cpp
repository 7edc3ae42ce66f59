// The loops of group_norm_silu over rows, compiled once per instruction set.
//
// Statistics are sums, so no bits are promised here: multiply-adds are fused (CMakeLists.txt), and SiLU leaves out what
// only matters below 1e-36.
#include "group_norm_rows.h"

namespace ddpm_fast {
namespace {

// exp(-v) for |v| <= 87.3 (further out, that of the bound), where the power of two is a normal number.
constexpr float kBound = 87.3f;
DDPM_FAST_HD float exp_of_minus(float v) {
  const ExpParts e = exp_parts(v > kBound ? -kBound : -v);
  return e.p * pow2(e.n);
}
DDPM_FAST_HD float bounded(float v) { return v < -kBound ? -kBound : v; }

// v / (1 + exp(-v)) within 3 ulp down to v = -87.3, and -1e-36 below
DDPM_FAST_HD float silu_of(float v) {
  const float w = bounded(v);
  return w / (1.0f + exp_of_minus(w));
}

// s (1 + v (1 - s)) with s = 1 / (1 + exp(-v))
DDPM_FAST_HD float silu_gradient_of(float v) {
  const float w = bounded(v), e = exp_of_minus(w), s = 1.0f / (1.0f + e);
  return s * (1.0f + w * (e * s));
}

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

// The sum of the lanes, as a tree, left in the first.
template <int kLanes>
DDPM_FAST_HD void fold(float* lanes) {
  if constexpr (kLanes > 1) {
    for (int j = 0; j < kLanes / 2; ++j)
      lanes[j] += lanes[j + kLanes / 2];
    fold<kLanes / 2>(lanes);
  }
}

// What is summed of each element: kSums values added to `to`, kLanes apart. Sums over a piece are taken in float32, in
// lanes of at most 64 elements each, and sums of pieces in float64.
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

// sums[k][row] += the sums over each row
template <int kLanes, typename Terms>
DDPM_FAST_HD void sum_along(const Terms& terms, double* const* sums, int64_t rows, int64_t length) {
  for (int64_t r = 0; r < rows; ++r) {
    float lanes[Terms::kSums * kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= length; i += kLanes) {
      for (int j = 0; j < kLanes; ++j)
        terms.template add<kLanes>(lanes + j, r, i + j, r);
    }
    for (int j = 0; i + j < length; ++j)
      terms.template add<kLanes>(lanes + j, r, i + j, r);
    for (int k = 0; k < Terms::kSums; ++k) {
      fold<kLanes>(lanes + k * kLanes);
      sums[k][r] += static_cast<double>(lanes[k * kLanes]);
    }
  }
}

// sums[k][column] += the sums over kLanes columns (or the first `width` of them), from the first row to the last
template <int kLanes, bool kAll, typename Terms>
DDPM_FAST_HD void sum_columns(const Terms& terms, double* const* sums, int64_t rows, int64_t first, int width) {
  float lanes[Terms::kSums * kLanes] = {};
  const int columns = kAll ? kLanes : width;
  for (int64_t r = 0; r < rows; ++r) {
    for (int j = 0; j < columns; ++j)
      terms.template add<kLanes>(lanes + j, r, first + j, first + j);
  }
  for (int k = 0; k < Terms::kSums; ++k) {
    for (int j = 0; j < columns; ++j)
      sums[k][first + j] += static_cast<double>(lanes[k * kLanes + j]);
  }
}

template <typename Terms>
DDPM_FAST_HD void sum_rows(const Terms& terms, double* const* sums, const Rows& rows, bool across) {
  constexpr int kNarrow = 16, kWide = 32;
  if (!across && rows.length < 2 * kWide) return sum_along<kNarrow>(terms, sums, rows.count, rows.length);
  if (!across) return sum_along<kWide>(terms, sums, rows.count, rows.length);
  int64_t i = 0;
  for (; i + kWide <= rows.length; i += kWide)
    sum_columns<kWide, true>(terms, sums, rows.count, i, kWide);
  for (; i + kNarrow <= rows.length; i += kNarrow)
    sum_columns<kNarrow, true>(terms, sums, rows.count, i, kNarrow);
  if (i < rows.length) sum_columns<kNarrow, false>(terms, sums, rows.count, i, static_cast<int>(rows.length - i));
}

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
