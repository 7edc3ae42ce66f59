// The loops of group_norm_silu over rows, compiled once per instruction set.
#include "group_norm_rows.h"

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
      out[i] = kSilu ? silu(u) : u;
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
      out[i] = g_y[i] * silu_grad((in[i] - c.offset[k]) * c.scale[k] + c.beta[k]);
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
template <int kLanes, typename Number>
DDPM_FAST_HD void fold(Number* lanes) {
  if constexpr (kLanes > 1) {
    for (int j = 0; j < kLanes / 2; ++j)
      lanes[j] += lanes[j + kLanes / 2];
    fold<kLanes / 2>(lanes);
  }
}

// What is summed of each element: kSums values added to `to`, kLanes apart. Sums over a piece are taken in Number, in
// as many lanes as a loop has at a time, and sums of pieces in float64.
struct Values {  // h
  static constexpr int kSums = 1;
  using Number = float;
  FloatRows h;
  template <int kLanes>
  DDPM_FAST_HD void add(Number* to, int64_t r, int64_t i, int64_t) const {
    to[0] += h.v[r * h.stride + i];
  }
};
struct Moments {  // of h about a value near its mean, so that float32 is enough
  static constexpr int kSums = 2;
  using Number = float;
  FloatRows h;
  const float* shift;
  template <int kLanes>
  DDPM_FAST_HD void add(Number* to, int64_t r, int64_t i, int64_t k) const {
    const float d = h.v[r * h.stride + i] - shift[k];
    to[0] += d;
    to[kLanes] += d * d;
  }
};
struct GradientSums {  // g_u, g_u d and d, with d = h - offset; differences of these sums are formed later
  static constexpr int kSums = 3;
  using Number = double;
  FloatRows g_u, h;
  const float* offset;
  template <int kLanes>
  DDPM_FAST_HD void add(Number* to, int64_t r, int64_t i, int64_t k) const {
    const double g = static_cast<double>(g_u.v[r * g_u.stride + i]);
    const double d = static_cast<double>(h.v[r * h.stride + i] - offset[k]);
    to[0] += g;
    to[kLanes] += g * d;
    to[2 * kLanes] += d;
  }
};

// sums[k][row] += the sums over each row
template <int kLanes, typename Terms>
DDPM_FAST_HD void sum_along(const Terms& terms, double* const* sums, int64_t rows, int64_t length) {
  for (int64_t r = 0; r < rows; ++r) {
    typename Terms::Number lanes[Terms::kSums * kLanes] = {};
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
  typename Terms::Number lanes[Terms::kSums * kLanes] = {};
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
  constexpr int kNarrow = 16, kWide = sizeof(typename Terms::Number) == 4 ? 32 : 16;
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
