// Around the two matrix products of attention: keys and values into gemm's layout of b, softmax over rows of scores,
// rescaling, dividing. Included by isa_*.cpp only, after vector.h.
#pragma once

#include "kernels.h"

namespace {

using ddpm_fast::inference::kGroupPanels;
using ddpm_fast::inference::kPanel;
using ddpm_fast::inference::Operand;
using ddpm_fast::inference::Softmax;

constexpr float kLowest = -3.4028235e38f;

// Two values of bfloat16, or a float: what b holds side by side of one column.
constexpr int64_t kWordValues = 4 / sizeof(Value);

#if DDPM_FAST_VECTOR_BYTES == 64
#define DDPM_FAST_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define DDPM_FAST_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif DDPM_FAST_VECTOR_BYTES == 32
#define DDPM_FAST_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define DDPM_FAST_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define DDPM_FAST_LOW 0, 4, 1, 5
#define DDPM_FAST_HIGH 2, 6, 3, 7
#endif

#if defined(__clang__)
#define DDPM_FAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DDPM_FAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntRegister{__VA_ARGS__})
#endif

// Interleaves the first half of the rows with the second, log2(kLanes) times; then rows are columns.
inline __attribute__((always_inline)) void transpose(Register (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    Register next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = DDPM_FAST_SHUFFLE(rows[i], rows[i + kLanes / 2], DDPM_FAST_LOW);
      next[2 * i + 1] = DDPM_FAST_SHUFFLE(rows[i], rows[i + kLanes / 2], DDPM_FAST_HIGH);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      rows[i] = next[i];
  }
}

#undef DDPM_FAST_LOW
#undef DDPM_FAST_HIGH
#undef DDPM_FAST_SHUFFLE

// The first `count` of a register's words, zeros after them; nothing is read beyond.
inline __attribute__((always_inline)) Register load_words(const Value* p, int64_t count) {
#if DDPM_FAST_VECTOR_BYTES == 64
  return (Register)_mm512_maskz_loadu_ps(count >= kLanes ? 0xffff : (1u << count) - 1, p);
#else
  if (count >= kLanes) return load_register(reinterpret_cast<const float*>(p));
  Register r = splat_register(0.0f);
  std::memcpy(&r, p, static_cast<size_t>(count) * 4);
  return r;
#endif
}

// b[k, j] = source[j][k]
void pack_columns(const Operand& o) {
  const int64_t words = o.length / kWordValues, padded = o.k / kWordValues;
  const Value* source = static_cast<const Value*>(o.source);
  float* b = static_cast<float*>(o.b);
  for (int64_t j = 0; j < o.width; j += kLanes)
    for (int64_t k = 0; k < padded; k += kLanes) {
      const int64_t left = words > k ? words - k : 0;
      Register rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        rows[i] =
            j + i < o.count ? load_words(source + (j + i) * o.stride + k * kWordValues, left) : splat_register(0.0f);
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (k + i < padded) store_register(b + (k + i) * o.width + j, rows[i]);
    }
}

// b[k, j] = source[k][j]
void pack_rows(const Operand& o) {
  const Value* source = static_cast<const Value*>(o.source);
  for (int64_t k = 0; k < o.k; k += kWordValues)
    for (int64_t j = 0; j < o.width; j += kPanel) {
      const Value* p = source + k * o.stride + j;
      const int64_t left = o.length - j;
#if DDPM_FAST_HALF
      const __mmask16 mask = left >= kPanel ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
      const __m256i even = _mm256_maskz_loadu_epi16(k < o.count ? mask : 0, p);
      const __m256i odd = _mm256_maskz_loadu_epi16(k + 1 < o.count ? mask : 0, p + o.stride);
      const __m512i pairs =
          _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
      _mm512_storeu_si512(static_cast<Value*>(o.b) + k * o.width + 2 * j, pairs);
#else
      Vec v;
      DDPM_FAST_EACH {
        const int64_t count = k < o.count ? left - i * kLanes : 0;
        v.r[i] = count > 0 ? load_words(p + i * kLanes, count) : splat_register(0.0f);
      }
      store(static_cast<float*>(o.b) + k * o.width + j, v);
#endif
    }
}

// e^x for x <= 0 or NaN.
DDPM_FAST_VEC weight(Vec x) { return power_of_e<1>(larger(splat(-87.0f), x)); }

// Calls body(scores, column) for all panels of row i.
template <typename Body>
inline __attribute__((always_inline)) void each_panel(const Softmax& s, int64_t i, const Body& body) {
  const int64_t padded = (s.columns + kPanel - 1) / kPanel * kPanel;
  for (int64_t first = 0; first < padded; first += kGroupPanels * kPanel) {
    const int64_t left = padded - first, width = left < kGroupPanels * kPanel ? left : kGroupPanels * kPanel;
    float* row = s.scores + first * s.m + i * width;
    for (int64_t j = 0; j < width; j += kPanel)
      body(row + j, first + j);
  }
}

void softmax(const Softmax& s) {
  const int64_t padded = (s.columns + kPanel - 1) / kPanel * kPanel;
  for (int64_t i = 0; i < s.m; ++i) {
    if (padded != s.columns)
      each_panel(s, i, [&](float* scores, int64_t column) {
        for (int64_t j = s.columns - column; j < kPanel; ++j)
          scores[j] = kLowest;  // columns that do not exist
      });
    Vec top = splat(s.most[i]);
    each_panel(s, i, [&](const float* scores, int64_t) { top = larger(top, load(scores)); });
    const float most = largest(top);
    const Vec shift = splat(most), scale = splat(s.scale);
    Vec sum = splat(0.0f);
    Value* weights = static_cast<Value*>(s.weights) + i * s.stride;
    each_panel(s, i, [&](const float* scores, int64_t column) {
      const Vec w = weight((load(scores) - shift) * scale);
      sum = sum + w;
      store(weights + column, w);
    });
    for (int64_t j = padded; j < s.k; j += kPanel)
      store(weights + j, splat(0.0f));
    float factor[kPanel];
    store(factor, weight((splat(s.most[i]) - shift) * scale));
    s.factor[i] = factor[0];
    s.sum[i] = s.sum[i] * factor[0] + total(sum);
    s.most[i] = most;
  }
}

void rescale_add(float* sums, const float* more, const float* factor, int64_t m, int64_t width) {
  for (int64_t i = 0; i < m; ++i, sums += width, more += width) {
    const Vec f = splat(factor[i]);
    for (int64_t j = 0; j < width; j += kPanel)
      store(sums + j, load(sums + j) * f + load(more + j));
  }
}

void store_divided(
    const float* sums, int64_t width, int64_t m, int64_t columns, const float* divisor, void* out, int64_t stride
) {
  Value* target = static_cast<Value*>(out);
  for (int64_t i = 0; i < m; ++i, sums += width, target += stride) {
    const Vec f = splat(1.0f / divisor[i]);
    int64_t j = 0;
    for (; j + kPanel <= columns; j += kPanel)
      store(target + j, load(sums + j) * f);
    if (j < columns) {
      Value rest[kPanel];
      store(rest, load(sums + j) * f);
      std::memcpy(target + j, rest, static_cast<size_t>(columns - j) * sizeof(Value));
    }
  }
}

}  // namespace
