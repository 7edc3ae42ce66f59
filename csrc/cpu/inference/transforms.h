// The layer around the matrix products: Winograd's transforms, bias, activation, time embedding, pooling. Included by
// isa_*.cpp only, after vector.h.
//
// Winograd F(2x2, 3x3) (Lavin and Gray 2015): Y = A^T [(G g G^T) . (B^T d B)] A with points 0, 1, -1, infinity: 16
// products in place of 36 for four outputs. An image of 2x2 pixels needs 9: in one dimension, with zeros outside,
//   y0 = w1 x0 + w2 x1 = w1 (x0 + x1) + (w2 - w1) x1
//   y1 = w0 x0 + w1 x1 = w1 (x0 + x1) + (w0 - w1) x0,
// three products in place of six, and the same again in the other dimension. Pixels that are doubled (nearest
// neighbour) before the convolution also need 9 for their four outputs, in place of 36: with neighbours l and r of
// pixel x,
//   y0 = w0 l + (w1 + w2) x = w0 (l - x) + (w0 + w1 + w2) x
//   y1 = (w0 + w1) x + w2 r = (w0 + w1 + w2) x - w2 (x - r).
#pragma once

#include "kernels.h"

namespace {

using ddpm_fast::inference::Finish;
using ddpm_fast::inference::kPanel;

// One column of four pixels times B^T.
inline __attribute__((always_inline)) void
winograd_column(const void* const* pixels, int64_t line, int64_t c, Vec (&rows)[4][4], int column) {
  const Vec d0 = load(static_cast<const Value*>(pixels[0]) + c);
  const Vec d1 = load(static_cast<const Value*>(pixels[line]) + c);
  const Vec d2 = load(static_cast<const Value*>(pixels[2 * line]) + c);
  const Vec d3 = load(static_cast<const Value*>(pixels[3 * line]) + c);
  rows[0][column] = d0 - d2;
  rows[1][column] = d1 + d2;
  rows[2][column] = d2 - d1;
  rows[3][column] = d1 - d3;
}

void winograd_in(const void* const* pixels, int64_t count, int64_t channels, void* v, int64_t stride) {
  const int64_t line = 2 * count + 2;
  for (int64_t c = 0; c < channels; c += kPanel) {
    Vec rows[4][4];  // B^T d; neighbours share two columns
    winograd_column(pixels, line, c, rows, 0);
    winograd_column(pixels + 1, line, c, rows, 1);
    Value* out = static_cast<Value*>(v) + c;
    for (int64_t i = 0; i < count; ++i, out += channels) {
      winograd_column(pixels + 2 * i + 2, line, c, rows, 2);
      winograd_column(pixels + 2 * i + 3, line, c, rows, 3);
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) {
        Vec* d = rows[y];
        Value* target = out + 4 * y * stride;
        store(target, d[0] - d[2]);
        store(target + stride, d[1] + d[2]);
        store(target + 2 * stride, d[2] - d[1]);
        store(target + 3 * stride, d[1] - d[3]);
        d[0] = d[2];
        d[1] = d[3];
      }
    }
  }
}

void window_in(const void* const* pixels, int64_t channels, void* v, int64_t stride) {
  Value* out = static_cast<Value*>(v);
  for (int64_t c = 0; c < channels; c += kPanel) {
    const Vec a = load(static_cast<const Value*>(pixels[0]) + c), b = load(static_cast<const Value*>(pixels[1]) + c);
    const Vec d = load(static_cast<const Value*>(pixels[2]) + c), e = load(static_cast<const Value*>(pixels[3]) + c);
    const Vec rows[3][2] = {{a + d, b + e}, {d, e}, {a, b}};
#pragma GCC unroll 3
    for (int y = 0; y < 3; ++y) {
      Value* target = out + 3 * y * stride + c;
      store(target, rows[y][0] + rows[y][1]);
      store(target + stride, rows[y][1]);
      store(target + 2 * stride, rows[y][0]);
    }
  }
}

// One column of three pixels: what its middle one differs by from the upper and from the lower one, and itself.
inline __attribute__((always_inline)) void
doubled_column(const void* const* pixels, int64_t line, int64_t c, Vec (&rows)[3][3], int column) {
  const Vec above = load(static_cast<const Value*>(pixels[0]) + c);
  const Vec middle = load(static_cast<const Value*>(pixels[line]) + c);
  const Vec below = load(static_cast<const Value*>(pixels[2 * line]) + c);
  rows[0][column] = above - middle;
  rows[1][column] = middle;
  rows[2][column] = middle - below;
}

void doubled_in(const void* const* pixels, int64_t count, int64_t channels, void* v, int64_t stride) {
  const int64_t line = count + 2;
  for (int64_t c = 0; c < channels; c += kPanel) {
    Vec rows[3][3];  // neighbours share two columns
    doubled_column(pixels, line, c, rows, 0);
    doubled_column(pixels + 1, line, c, rows, 1);
    Value* out = static_cast<Value*>(v) + c;
    for (int64_t i = 0; i < count; ++i, out += channels) {
      doubled_column(pixels + i + 2, line, c, rows, 2);
#pragma GCC unroll 3
      for (int y = 0; y < 3; ++y) {
        Vec* d = rows[y];
        Value* target = out + 3 * y * stride;
        store(target, d[0] - d[1]);
        store(target + stride, d[1]);
        store(target + 2 * stride, d[1] - d[2]);
        d[0] = d[1];
        d[1] = d[2];
      }
    }
  }
}

struct Window {
  Vec y[4];
};

struct WinogradOut {
  static inline __attribute__((always_inline)) Window of(const float* m, int64_t stride) {
    Vec rows[2][4];  // A^T M
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const Vec m0 = load(m + x * stride), m1 = load(m + (4 + x) * stride);
      const Vec m2 = load(m + (8 + x) * stride), m3 = load(m + (12 + x) * stride);
      rows[0][x] = m0 + m1 + m2;
      rows[1][x] = m1 - m2 - m3;
    }
    Window w;
#pragma GCC unroll 2
    for (int y = 0; y < 2; ++y) {
      w.y[2 * y] = rows[y][0] + rows[y][1] + rows[y][2];
      w.y[2 * y + 1] = rows[y][1] - rows[y][2] - rows[y][3];
    }
    return w;
  }
};

struct WindowOut {
  static inline __attribute__((always_inline)) Window of(const float* m, int64_t stride) {
    Vec rows[2][3];
#pragma GCC unroll 3
    for (int x = 0; x < 3; ++x) {
      const Vec both = load(m + x * stride);
      rows[0][x] = both + load(m + (3 + x) * stride);
      rows[1][x] = both + load(m + (6 + x) * stride);
    }
    Window w;
#pragma GCC unroll 2
    for (int y = 0; y < 2; ++y) {
      w.y[2 * y] = rows[y][0] + rows[y][1];
      w.y[2 * y + 1] = rows[y][0] + rows[y][2];
    }
    return w;
  }
};

struct DoubledOut {
  static inline __attribute__((always_inline)) Window of(const float* m, int64_t stride) {
    Vec rows[2][3];
#pragma GCC unroll 3
    for (int x = 0; x < 3; ++x) {
      const Vec middle = load(m + (3 + x) * stride);
      rows[0][x] = load(m + x * stride) + middle;
      rows[1][x] = middle - load(m + (6 + x) * stride);
    }
    Window w;
#pragma GCC unroll 2
    for (int y = 0; y < 2; ++y) {
      w.y[2 * y] = rows[y][0] + rows[y][1];
      w.y[2 * y + 1] = rows[y][1] - rows[y][2];
    }
    return w;
  }
};

struct DirectOut {
  static inline __attribute__((always_inline)) Window of(const float* m, int64_t stride) {
    return {{load(m), load(m + stride), load(m + 2 * stride), load(m + 3 * stride)}};
  }
};

template <typename Out, bool kSilu>
void finish_as(const Finish& f) {
  for (int64_t c = 0; c < f.panels * kPanel; c += kPanel) {
    Window w = Out::of(f.m + c, f.stride);
    const Vec bias = load(f.bias + c);
    Vec temb = splat(0.0f);
    if (f.temb != nullptr) temb = load(f.temb + c);
    if (f.label != nullptr) temb = temb + load(f.label + c);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      w.y[i] = w.y[i] + bias;
      if (kSilu) w.y[i] = silu(w.y[i]);
      w.y[i] = w.y[i] + temb;
      if (f.out[i] == nullptr) continue;
      if (f.residual[0] != nullptr) w.y[i] = w.y[i] + load(static_cast<const Value*>(f.residual[i]) + c);
      store(static_cast<Value*>(f.out[i]) + c, w.y[i]);
    }
    if (f.pooled != nullptr) {
      const Vec top = larger(w.y[0], w.y[1]), bottom = larger(w.y[2], w.y[3]);
      store(static_cast<Value*>(f.pooled) + c, larger(top, bottom));
    }
  }
}

template <typename Out>
void finish(const Finish& f) {
  if (f.silu)
    finish_as<Out, true>(f);
  else
    finish_as<Out, false>(f);
}

void store_rows(
    const float* c, int64_t c_stride, int64_t m, int64_t panels, const float* bias, const void* const* residual,
    void* const* out
) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < panels * kPanel; j += kPanel) {
      Vec y = load(c + i * c_stride + j) + load(bias + j);
      if (residual != nullptr) y = y + load(static_cast<const Value*>(residual[i]) + j);
      store(static_cast<Value*>(out[i]) + j, y);
    }
}

void to_float(const void* source, int64_t count, float* target) {
  for (int64_t i = 0; i < count; i += kPanel)
    store(target + i, load(static_cast<const Value*>(source) + i));
}

}  // namespace
