// Sums over the rows or the columns of a piece, for the loops of the norms.
//
// `Terms` has kSums values of an element and add<kLanes>(to, row, column, k), which adds them to `to`, kLanes apart; k
// is the index of their sums. Sums over a piece are taken in float32, in lanes of at most 64 elements each (of rows no
// longer than 2048, or of 64 rows), and sums of pieces in float64.
#pragma once

#include "tile.h"

namespace ddpm_fast {

// The sum of the lanes, as a tree, left in the first.
template <int kLanes>
DDPM_FAST_HD void fold(float* lanes) {
  if constexpr (kLanes > 1) {
    for (int j = 0; j < kLanes / 2; ++j)
      lanes[j] += lanes[j + kLanes / 2];
    fold<kLanes / 2>(lanes);
  }
}

// sums[k][row] += the sums over each row; kWhole: its length is a multiple of kLanes, which so stay in registers
template <int kLanes, bool kWhole, typename Terms>
DDPM_FAST_HD void sum_along(const Terms& terms, double* const* sums, int64_t rows, int64_t length) {
  for (int64_t r = 0; r < rows; ++r) {
    float lanes[Terms::kSums * kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= length; i += kLanes) {
      for (int j = 0; j < kLanes; ++j)
        terms.template add<kLanes>(lanes + j, r, i + j, r);
    }
    for (int j = 0; !kWhole && i + j < length; ++j)
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
  if (!across && rows.length < 2 * kWide) {
    return rows.length % kNarrow == 0 ? sum_along<kNarrow, true>(terms, sums, rows.count, rows.length)
                                      : sum_along<kNarrow, false>(terms, sums, rows.count, rows.length);
  }
  if (!across) {
    return rows.length % kWide == 0 ? sum_along<kWide, true>(terms, sums, rows.count, rows.length)
                                    : sum_along<kWide, false>(terms, sums, rows.count, rows.length);
  }
  int64_t i = 0;
  for (; i + kWide <= rows.length; i += kWide)
    sum_columns<kWide, true>(terms, sums, rows.count, i, kWide);
  for (; i + kNarrow <= rows.length; i += kNarrow)
    sum_columns<kNarrow, true>(terms, sums, rows.count, i, kNarrow);
  if (i < rows.length) sum_columns<kNarrow, false>(terms, sums, rows.count, i, static_cast<int>(rows.length - i));
}

}  // namespace ddpm_fast
