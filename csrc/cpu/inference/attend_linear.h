// Around the two matrix products of linear attention: softmaxes over keys and over channels. Included by isa_*.cpp
// only, after attend.h.
#pragma once

#include "kernels.h"

namespace {

using ddpm_fast::inference::KeyWeights;
using ddpm_fast::inference::kGroupPanels;
using ddpm_fast::inference::kPanel;
using ddpm_fast::inference::Merge;
using ddpm_fast::inference::RowWeights;

// Words of 16 channels: of one key, or of two where a word holds two values.
inline __attribute__((always_inline)) Vec
key_words(const Value* key, const KeyWeights& w, int64_t left, Vec most, Vec& sum) {
  if (left <= 0) return splat(0.0f);
  const Vec first = weight(load(key) - most);
  sum = sum + first;
#if DDPM_FAST_HALF
  Vec second = splat(0.0f);
  if (left > 1) {
    second = weight(load(key + w.key_stride) - most);
    sum = sum + second;
  }
  // [second | first] in halves of a register, then value by value side by side.
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second.r[0], (__m512)first.r[0]);
  const __m512i side_by_side = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16,
      0
  );
  Vec words;
  words.r[0] = (Register)_mm512_permutexvar_epi16(side_by_side, both);
  return words;
#else
  (void)w;
  return first;
#endif
}

void key_weights(const KeyWeights& w) {
  for (int64_t c = 0; c < w.depth; c += kPanel) {
    const Value* keys = static_cast<const Value*>(w.keys) + c;
    // Four at a time: each has to wait for itself only.
    Vec tops[4] = {splat(kLowest), splat(kLowest), splat(kLowest), splat(kLowest)};
    int64_t j = 0;
    for (; j + 4 <= w.count; j += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        tops[i] = larger(tops[i], load(keys + (j + i) * w.key_stride));
    for (; j < w.count; ++j)
      tops[0] = larger(tops[0], load(keys + j * w.key_stride));
    const Vec most = larger(larger(tops[0], tops[1]), larger(tops[2], tops[3]));
    store(w.most + c, most);

    Vec sum = splat(0.0f);
    float* rows = static_cast<float*>(w.weights) + c * w.weights_stride / kWordValues;
    for (int64_t word = 0; word < w.k / kWordValues; word += kLanes) {
      Register columns[kRegisters][kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int64_t key = (word + i) * kWordValues;
        const Vec words = key_words(keys + key * w.key_stride, w, w.count - key, most, sum);
#pragma GCC unroll 4
        for (int r = 0; r < kRegisters; ++r)
          columns[r][i] = words.r[r];
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRegisters; ++r) {
        transpose(columns[r]);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          store_register(rows + (r * kLanes + i) * w.weights_stride / kWordValues + word, columns[r][i]);
      }
    }
    store(w.sum + c, sum);
  }
}

void merge(const Merge& m) {
  constexpr int64_t kWidth = kGroupPanels * kPanel;
  const int64_t context = 2 * m.depth + m.first * m.depth;
  for (int64_t d = 0; d < m.depth; d += kPanel) {
    Vec top = splat(kLowest), sum = splat(0.0f);
    for (int64_t p = 0; p < m.count; ++p)
      top = larger(top, load(m.parts[p] + d));
    float rows[kPanel * kWidth] = {}, factor[kPanel];
    for (int64_t p = 0; p < m.count; ++p) {
      const Vec share = weight(load(m.parts[p] + d) - top);
      sum = sum + share * load(m.parts[p] + m.depth + d);
      store(factor, share);
      const float* part = m.parts[p] + context + d * m.width;
      for (int64_t i = 0; i < kPanel; ++i) {
        const Vec f = splat(factor[i]);
        for (int64_t e = 0; e < m.width; e += kPanel)
          store(rows + i * kWidth + e, load(rows + i * kWidth + e) + f * load(part + i * m.width + e));
      }
    }
    store(factor, sum);
    Value* target = static_cast<Value*>(m.target) + d * m.width;
    for (int64_t i = 0; i < kPanel; ++i) {
      const Vec f = splat(m.scale / factor[i]);
      for (int64_t e = 0; e < m.width; e += kPanel)
        store(target + i * m.width + e, load(rows + i * kWidth + e) * f);
    }
  }
}

void row_weights(const RowWeights& w) {
  const Value* row = static_cast<const Value*>(w.rows);
  Value* weights = static_cast<Value*>(w.weights);
  for (int64_t i = 0; i < w.m; ++i, row += w.row_stride, weights += w.depth) {
    Vec top = load(row), sum = splat(0.0f);
    for (int64_t c = kPanel; c < w.depth; c += kPanel)
      top = larger(top, load(row + c));
    const Vec most = splat(largest(top));
    for (int64_t c = 0; c < w.depth; c += kPanel) {
      const Vec e = weight(load(row + c) - most);
      sum = sum + e;
      store(weights + c, e);
    }
    w.sum[i] = total(sum);
  }
}

}  // namespace
