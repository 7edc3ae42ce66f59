// The loops of batch_norm_silu over rows, compiled once per instruction set.
//
// As for the other norms, statistics are sums, so no bits are promised here and multiply-adds are fused.
#include "batch_norm_rows.h"

#include <type_traits>

#include "row_sums.h"
#include "silu_rows.h"

namespace ddpm_fast {
namespace {

// h, and what goes with the element in row r, column i.
template <typename T, bool kAcross>
struct Elements {
  View<T> h;
  const BatchCoefficients& c;
  DDPM_FAST_HD static int64_t channel(int64_t r, int64_t i) { return kAcross ? i : r; }
  DDPM_FAST_HD float d(int64_t r, int64_t i) const { return h.at(r, i) - c.offset[channel(r, i)]; }
  DDPM_FAST_HD float u(int64_t r, int64_t i) const { return d(r, i) * c.scale[channel(r, i)] + c.beta[channel(r, i)]; }
};

struct Normalize {
  static constexpr int64_t kChunk = 256;
  bool silu;
  OutputRows y;
  Rows rows;
  template <bool kSilu, bool kAdds, typename T, bool kAcross>
  DDPM_FAST_HD void run(const Elements<T, kAcross>& e) const {
    for (int64_t r = 0; r < rows.count; ++r) {
      for (int64_t first = 0; first < rows.length; first += kChunk) {
        // Rounding in the same loop as SiLU leaves it too few registers.
        alignas(64) float chunk[kChunk];
        const int64_t count = std::min(kChunk, rows.length - first);
        for (int64_t j = 0; j < count; ++j) {
          const int64_t i = first + j;
          const float u = e.u(r, i), activated = kSilu ? silu_of(u) : u;
          chunk[j] = kAdds ? activated + e.c.temb[e.channel(r, i)] : activated;
        }
        T* __restrict__ out = static_cast<T*>(y.v) + r * y.stride + first;
        for (int64_t j = 0; j < count; ++j)
          narrow(chunk[j], out[j]);
      }
    }
  }
  template <typename E>
  DDPM_FAST_HD void operator()(const E& e) const {
    if (e.c.temb == nullptr)
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
      for (int64_t i = 0; i < rows.length; ++i) {
        const int64_t k = e.channel(r, i);
        narrow(g[i] * e.c.scale[k] - (e.c.base[k] + e.d(r, i) * e.c.slope[k]), out[i]);
      }
    }
  }
};

// What row_sums.h sums of each element.
template <typename E>
struct Values {  // h
  static constexpr int kSums = 1;
  E e;
  FloatRows g_u;  // not needed
  template <int kLanes>
  DDPM_FAST_HD void add(float* to, int64_t r, int64_t i, int64_t) const {
    to[0] += e.h.at(r, i);
  }
};
template <typename E>
struct Moments {  // d and d^2
  static constexpr int kSums = 2;
  E e;
  FloatRows g_u;  // not needed
  template <int kLanes>
  DDPM_FAST_HD void add(float* to, int64_t r, int64_t i, int64_t) const {
    const float d = e.d(r, i);
    to[0] += d;
    to[kLanes] += d * d;
  }
};
template <typename E>
struct Gradients {  // g_u and g_u d
  static constexpr int kSums = 2;
  E e;
  FloatRows g_u;
  template <int kLanes>
  DDPM_FAST_HD void add(float* to, int64_t r, int64_t i, int64_t) const {
    const float g = g_u.v[r * g_u.stride + i];
    to[0] += g;
    to[kLanes] += g * e.d(r, i);
  }
};

template <template <typename> class Terms>
struct Sum {
  FloatRows g_u;
  double* const* sums;
  Rows rows;
  template <typename T, bool kAcross>
  DDPM_FAST_HD void operator()(const Elements<T, kAcross>& e) const {
    sum_rows(Terms<Elements<T, kAcross>>{e, g_u}, sums, rows, kAcross);
  }
};

// Calls body with the Elements of a kind.
template <typename Body>
DDPM_FAST_HD void call(const BatchKind& kind, const ImageRows& h, const BatchCoefficients& c, const Body& body) {
  if (kind.across && kind.half)
    body(Elements<BFloat16, true>{View<BFloat16>(h), c});
  else if (kind.across)
    body(Elements<float, true>{View<float>(h), c});
  else if (kind.half)
    body(Elements<BFloat16, false>{View<BFloat16>(h), c});
  else
    body(Elements<float, false>{View<float>(h), c});
}

BatchCoefficients only_offset(const float* offset) { return {offset, nullptr, nullptr, nullptr, nullptr, nullptr}; }

}  // namespace

// ---- the loops above, once per instruction set ----

DDPM_FAST_CLONES void batch_normalize_rows(
    const BatchKind& kind, const ImageRows& h, const BatchCoefficients& c, const OutputRows& y, const Rows& rows
) {
  call(kind, h, c, Normalize{kind.silu, y, rows});
}

DDPM_FAST_CLONES void batch_activation_gradient_rows(
    const BatchKind& kind, const ImageRows& g, const ImageRows& h, const BatchCoefficients& c, float* g_u,
    const Rows& rows
) {
  call(kind, h, c, ActivationGradient{kind.silu, g, g_u, rows});
}

DDPM_FAST_CLONES void batch_pull_back_rows(
    const BatchKind& kind, const FloatRows& g_u, const ImageRows& h, const BatchCoefficients& c, const OutputRows& g_h,
    const Rows& rows
) {
  call(kind, h, c, PullBack{g_u, g_h, rows});
}

DDPM_FAST_CLONES void
batch_sum_values(const BatchKind& kind, const ImageRows& h, double* const* sums, const Rows& rows) {
  call(kind, h, only_offset(nullptr), Sum<Values>{{}, sums, rows});
}

DDPM_FAST_CLONES void batch_sum_moments(
    const BatchKind& kind, const ImageRows& h, const float* shift, double* const* sums, const Rows& rows
) {
  call(kind, h, only_offset(shift), Sum<Moments>{{}, sums, rows});
}

DDPM_FAST_CLONES void batch_sum_gradients(
    const BatchKind& kind, const FloatRows& g_u, const ImageRows& h, const float* offset, double* const* sums,
    const Rows& rows
) {
  call(kind, h, only_offset(offset), Sum<Gradients>{g_u, sums, rows});
}

}  // namespace ddpm_fast
