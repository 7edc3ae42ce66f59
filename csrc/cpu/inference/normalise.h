// GroupNorm's two passes over the pixels of an image: sums of every channel, then y = act(a x + b). Included by
// isa_*.cpp only, after vector.h.
#pragma once

#include "kernels.h"
#include "rest.h"

namespace {

using ddpm_fast::inference::kPanel;
using ddpm_fast::inference::Moments;
using ddpm_fast::inference::Normalise;

constexpr int kMomentPanels = kRegisters == 1 ? 8 : kRegisters == 2 ? 2 : 1;  // sums and shifts stay in registers
constexpr int kNormalisePanels = kRegisters == 1 ? 4 : 1;

// Pixel after pixel into one sum of each channel, so that its bits do not depend on how many panels go together.
template <int P>
void moments_of(const Moments& m, int64_t panel) {
  const int64_t c = panel * kPanel;
  Vec shift[P], sum[P], square[P];
#pragma GCC unroll 8
  for (int j = 0; j < P; ++j) {
    shift[j] = load(m.shift + c + j * kPanel);
    sum[j] = square[j] = splat(0.0f);
  }
  const Value* x = static_cast<const Value*>(m.source) + c;
  for (int64_t i = 0; i < m.pixels; ++i, x += m.stride) {
#pragma GCC unroll 8
    for (int j = 0; j < P; ++j) {
      const Vec d = load(x + j * kPanel) - shift[j];
      sum[j] = sum[j] + d;
      square[j] = square[j] + d * d;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < P; ++j) {
    store(m.sum + c + j * kPanel, sum[j]);
    store(m.square + c + j * kPanel, square[j]);
  }
}

void moments(const Moments& m) {
  int64_t panel = 0;
  for (; panel + kMomentPanels <= m.panels; panel += kMomentPanels)
    moments_of<kMomentPanels>(m, panel);
  with_rest<kMomentPanels>(m.panels - panel, [&](auto rest) { moments_of<decltype(rest)::value>(m, panel); });
}

template <int P, bool kSilu>
void normalise_panels(const Normalise& n, int64_t panel) {
  const int64_t c = panel * kPanel;
  Vec shift[P], scale[P], offset[P];
#pragma GCC unroll 4
  for (int j = 0; j < P; ++j) {
    shift[j] = load(n.shift + c + j * kPanel);
    scale[j] = load(n.scale + c + j * kPanel);
    offset[j] = load(n.offset + c + j * kPanel);
  }
  const Value* x = static_cast<const Value*>(n.source) + c;
  Value* y = static_cast<Value*>(n.target) + c;
  for (int64_t i = 0; i < n.pixels; ++i, x += n.source_stride, y += n.target_stride) {
#pragma GCC unroll 4
    for (int j = 0; j < P; ++j) {
      Vec v = (load(x + j * kPanel) - shift[j]) * scale[j] + offset[j];
      if (kSilu) v = silu(v);
      store(y + j * kPanel, v);
    }
  }
}

template <bool kSilu>
void normalise_as(const Normalise& n) {
  int64_t panel = 0;
  for (; panel + kNormalisePanels <= n.panels; panel += kNormalisePanels)
    normalise_panels<kNormalisePanels, kSilu>(n, panel);
  with_rest<kNormalisePanels>(n.panels - panel, [&](auto rest) {
    normalise_panels<decltype(rest)::value, kSilu>(n, panel);
  });
}

void normalise(const Normalise& n) {
  if (n.silu)
    normalise_as<true>(n);
  else
    normalise_as<false>(n);
}

}  // namespace
