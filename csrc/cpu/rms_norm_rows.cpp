// The loops of rms_norm_silu over rows, compiled once per instruction set.
//
// As for group_norm_silu, statistics are sums, so no bits are promised here and multiply-adds are fused.
#include "rms_norm_rows.h"

#include <type_traits>

#include "row_sums.h"
#include "silu_rows.h"

namespace ddpm_fast {
namespace {

// h, and what goes with the element in row r, column i.
template <typename T, bool kAcross>
struct Elements {
  using Held = std::conditional_t<kAcross, T, float>;
  View<Held> h;
  const RmsCoefficients& c;
  DDPM_FAST_HD float weight(int64_t r, int64_t i) const { return c.weight[kAcross ? i : r]; }
  DDPM_FAST_HD float beta(int64_t r, int64_t i) const { return c.beta[kAcross ? i : r]; }
  DDPM_FAST_HD float factor(int64_t r, int64_t i) const { return c.factor[kAcross ? r : i]; }
  DDPM_FAST_HD float slope(int64_t r, int64_t i) const { return c.slope[kAcross ? r : i]; }
  DDPM_FAST_HD float xhat(int64_t r, int64_t i) const { return h.at(r, i) * factor(r, i); }
  DDPM_FAST_HD float u(int64_t r, int64_t i) const { return xhat(r, i) * weight(r, i) + beta(r, i); }
};

template <bool kSilu, bool kAdds, typename T, bool kAcross>
struct Value {  // of y
  const Elements<T, kAcross>& e;
  const View<T>& added;
  DDPM_FAST_HD float at(int64_t r, int64_t i) const {
    const float u = e.u(r, i), activated = kSilu ? silu_of(u) : u;
    return kAdds ? activated + added.at(r, i) : activated;
  }
};

struct Normalize {
  static constexpr int64_t kChunk = 256;
  bool silu;
  ImageRows residual;
  OutputRows y;
  Rows rows;
  template <bool kSilu, bool kAdds, typename T, bool kAcross>
  DDPM_FAST_HD void run(const Elements<T, kAcross>& e) const {
    const View<T> added(residual);
    const auto value = Value<kSilu, kAdds, T, kAcross>{e, added};
    T* const first_out = static_cast<T*>(y.v);
    if constexpr (kSilu && !std::is_same_v<T, float>) {
      // Rounding in the same loop as SiLU leaves it too few registers.
      const int64_t together = y.stride == rows.length ? std::max<int64_t>(1, kChunk / rows.length) : 1;
      for (int64_t r = 0; r < rows.count; r += together) {
        const int64_t some = std::min(together, rows.count - r);
        for (int64_t i = 0; i < rows.length; i += kChunk) {
          alignas(64) float chunk[kChunk];
          const int64_t count = std::min(kChunk, rows.length - i);
          for (int64_t k = 0; k < some; ++k) {
            for (int64_t j = 0; j < count; ++j)
              chunk[k * count + j] = value.at(r + k, i + j);
          }
          T* __restrict__ out = first_out + r * y.stride + i;
          for (int64_t j = 0; j < some * count; ++j)
            narrow(chunk[j], out[j]);
        }
      }
    } else {
      for (int64_t r = 0; r < rows.count; ++r) {
        T* __restrict__ out = first_out + r * y.stride;
        for (int64_t i = 0; i < rows.length; ++i)
          narrow(value.at(r, i), out[i]);
      }
    }
  }
  template <typename E>
  DDPM_FAST_HD void operator()(const E& e) const {
    if (residual.v == nullptr)
      silu ? run<true, false>(e) : run<false, false>(e);
    else
      silu ? run<true, true>(e) : run<false, true>(e);
  }
};

struct ActivationGradient {
  bool silu;
  ImageRows g;
  float* g_u;
  Rows rows;
  template <bool kSilu, typename T, bool kAcross>
  DDPM_FAST_HD void run(const Elements<T, kAcross>& e) const {
    const View<T> g_y(g);
    for (int64_t r = 0; r < rows.count; ++r) {
      float* __restrict__ out = g_u + r * rows.length;
      for (int64_t i = 0; i < rows.length; ++i)
        out[i] = kSilu ? g_y.at(r, i) * silu_gradient_of(e.u(r, i)) : g_y.at(r, i);
    }
  }
  template <typename E>
  DDPM_FAST_HD void operator()(const E& e) const {
    silu ? run<true>(e) : run<false>(e);
  }
};

struct PullBack {
  FloatRows g_u;
  OutputRows g_h;
  Rows rows;
  template <typename T, bool kAcross>
  DDPM_FAST_HD void operator()(const Elements<T, kAcross>& e) const {
    for (int64_t r = 0; r < rows.count; ++r) {
      const float* g = g_u.v + r * g_u.stride;
      T* __restrict__ out = static_cast<T*>(g_h.v) + r * g_h.stride;
      for (int64_t i = 0; i < rows.length; ++i)
        narrow(e.factor(r, i) * (g[i] * e.weight(r, i) - e.h.at(r, i) * e.slope(r, i)), out[i]);
    }
  }
};

// What row_sums.h sums of each element.
template <typename E>
struct Squares {
  static constexpr int kSums = 1;
  E e;
  FloatRows g_u;  // not needed
  template <int kLanes>
  DDPM_FAST_HD void add(float* to, int64_t r, int64_t i, int64_t) const {
    const float v = e.h.at(r, i);
    to[0] += v * v;
  }
};
template <typename E>
struct Products {  // g_x h
  static constexpr int kSums = 1;
  E e;
  FloatRows g_u;
  template <int kLanes>
  DDPM_FAST_HD void add(float* to, int64_t r, int64_t i, int64_t) const {
    to[0] += g_u.v[r * g_u.stride + i] * e.weight(r, i) * e.h.at(r, i);
  }
};
template <typename E>
struct Gradients {  // g_u xhat and g_u
  static constexpr int kSums = 2;
  E e;
  FloatRows g_u;
  template <int kLanes>
  DDPM_FAST_HD void add(float* to, int64_t r, int64_t i, int64_t) const {
    const float g = g_u.v[r * g_u.stride + i];
    to[0] += g * e.xhat(r, i);
    to[kLanes] += g;
  }
};

template <template <typename> class Terms, bool kOfPlaces>
struct Sum {  // to sums of places or of channels
  FloatRows g_u;
  double* const* sums;
  Rows rows;
  template <typename T, bool kAcross>
  DDPM_FAST_HD void operator()(const Elements<T, kAcross>& e) const {
    sum_rows(Terms<Elements<T, kAcross>>{e, g_u}, sums, rows, kOfPlaces != kAcross);
  }
};

// Calls body with the Elements of a kind.
template <typename Body>
DDPM_FAST_HD void call(const RmsKind& kind, const ImageRows& h, const RmsCoefficients& c, const Body& body) {
  if (kind.across && kind.half)
    body(Elements<BFloat16, true>{View<BFloat16>(h), c});
  else if (kind.across)
    body(Elements<float, true>{View<float>(h), c});
  else if (kind.half)
    body(Elements<BFloat16, false>{View<float>(h), c});
  else
    body(Elements<float, false>{View<float>(h), c});
}

}  // namespace

// ---- the loops above, once per instruction set ----

DDPM_FAST_CLONES void rms_normalize_rows(
    const RmsKind& kind, const ImageRows& h, const RmsCoefficients& c, const ImageRows& residual, const OutputRows& y,
    const Rows& rows
) {
  call(kind, h, c, Normalize{kind.silu, residual, y, rows});
}

DDPM_FAST_CLONES void rms_activation_gradient_rows(
    const RmsKind& kind, const ImageRows& g, const ImageRows& h, const RmsCoefficients& c, float* g_u, const Rows& rows
) {
  call(kind, h, c, ActivationGradient{kind.silu, g, g_u, rows});
}

DDPM_FAST_CLONES void rms_pull_back_rows(
    const RmsKind& kind, const FloatRows& g_u, const ImageRows& h, const RmsCoefficients& c, const OutputRows& g_h,
    const Rows& rows
) {
  call(kind, h, c, PullBack{g_u, g_h, rows});
}

DDPM_FAST_CLONES void rms_sum_squares(const RmsKind& kind, const ImageRows& h, double* squares, const Rows& rows) {
  call(kind, h, {}, Sum<Squares, true>{{}, &squares, rows});
}

DDPM_FAST_CLONES void rms_sum_products(
    const RmsKind& kind, const FloatRows& g_u, const ImageRows& h, const RmsCoefficients& c, double* products,
    const Rows& rows
) {
  call(kind, h, c, Sum<Products, true>{g_u, &products, rows});
}

DDPM_FAST_CLONES void rms_sum_gradients(
    const RmsKind& kind, const FloatRows& g_u, const ImageRows& h, const RmsCoefficients& c, double* const* sums,
    const Rows& rows
) {
  call(kind, h, c, Sum<Gradients, false>{g_u, sums, rows});
}

}  // namespace ddpm_fast
