// RMSNorm: the sum of squares of every pixel of a short run, then y = act(scale x / |x| + shift) while they are still
// in the core's first cache. Included by isa_*.cpp only, after vector.h.
#pragma once

#include "kernels.h"
#include "rest.h"

namespace {

using ddpm_fast::inference::kPanel;
using ddpm_fast::inference::PixelNorm;

constexpr int kPixelsTogether = 16;  // whose roots are one vector operation
constexpr int kPixelPanels = kRegisters == 1 ? 4 : 1;

// 1 / max(|x|, eps) of `count` pixels.
inline __attribute__((always_inline)) void pixel_factors(const PixelNorm& n, const Value* x, int count, float* factor) {
  for (int i = 0; i < count; ++i, x += n.source_stride) {
    // Even and odd panels apart: two sums are ready sooner than one.
    Vec even = splat(0.0f), odd = splat(0.0f);
    int64_t c = 0;
    for (; c + 2 * kPanel <= n.panels * kPanel; c += 2 * kPanel) {
      const Vec a = load(x + c), b = load(x + c + kPanel);
      even = even + a * a;
      odd = odd + b * b;
    }
    if (c < n.panels * kPanel) {
      const Vec a = load(x + c);
      even = even + a * a;
    }
    factor[i] = total(even + odd);
  }
  for (int i = 0; i < kPixelsTogether; ++i) {
    const float root = __builtin_sqrtf(factor[i]);
    factor[i] = 1.0f / (root < n.eps ? n.eps : root);  // a NaN stays one
  }
}

struct PixelRun {
  const Value* x;
  const Value* residual;
  Value* y;
  int count;
  const float* factor;
};

template <int P, bool kSilu>
void scale_pixels(const PixelNorm& n, PixelRun run, int64_t panel) {
  const int64_t c = panel * kPanel;
  Vec scale[P], shift[P];
#pragma GCC unroll 4
  for (int j = 0; j < P; ++j) {
    scale[j] = load(n.scale + c + j * kPanel);
    shift[j] = n.shift == nullptr ? splat(0.0f) : load(n.shift + c + j * kPanel);
  }
  run.x += c, run.y += c;
  if (run.residual != nullptr) run.residual += c;
  for (int i = 0; i < run.count; ++i, run.x += n.source_stride, run.y += n.target_stride) {
    const Vec factor = splat(run.factor[i]);
#pragma GCC unroll 4
    for (int j = 0; j < P; ++j) {
      Vec v = load(run.x + j * kPanel) * factor * scale[j] + shift[j];
      if (kSilu) v = silu(v);
      if (run.residual != nullptr) v = v + load(run.residual + j * kPanel);
      store(run.y + j * kPanel, v);
    }
    if (run.residual != nullptr) run.residual += n.residual_stride;
  }
}

template <bool kSilu>
void normalise_pixels_as(const PixelNorm& n) {
  float factor[kPixelsTogether] = {};
  PixelRun run = {
      static_cast<const Value*>(n.source),
      static_cast<const Value*>(n.residual),
      static_cast<Value*>(n.target),
      0,
      factor,
  };
  for (int64_t pixel = 0; pixel < n.pixels; pixel += kPixelsTogether) {
    const int64_t left = n.pixels - pixel;
    run.count = left < kPixelsTogether ? static_cast<int>(left) : kPixelsTogether;
    pixel_factors(n, run.x, run.count, factor);
    int64_t panel = 0;
    for (; panel + kPixelPanels <= n.panels; panel += kPixelPanels)
      scale_pixels<kPixelPanels, kSilu>(n, run, panel);
    with_rest<kPixelPanels>(n.panels - panel, [&](auto rest) {
      scale_pixels<decltype(rest)::value, kSilu>(n, run, panel);
    });
    run.x += kPixelsTogether * n.source_stride;
    run.y += kPixelsTogether * n.target_stride;
    if (run.residual != nullptr) run.residual += kPixelsTogether * n.residual_stride;
  }
}

void normalise_pixels(const PixelNorm& n) {
  if (n.silu)
    normalise_pixels_as<true>(n);
  else
    normalise_pixels_as<false>(n);
}

}  // namespace
