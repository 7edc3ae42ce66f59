// Rows of an image as the loops of the norms read and write them where they lie: bfloat16 or float32.
#pragma once

#include "../dispatch.h"
#include "tile.h"

namespace ddpm_fast {

// `v` points to bfloat16 or float32 values, as the loop's kind says.
struct ImageRows {
  const void* v;
  int64_t stride;
};
struct OutputRows {
  void* v;
  int64_t stride;
};

struct BFloat16 {
  uint16_t bits;
};
DDPM_FAST_HD float widened(float value) { return value; }
DDPM_FAST_HD float widened(BFloat16 value) { return float_from_bf16(value.bits); }
DDPM_FAST_HD void narrow(float value, float& to) { to = value; }
DDPM_FAST_HD void narrow(float value, BFloat16& to) { to.bits = bf16_from_float(value); }

template <typename T>
struct View {
  const T* v;
  int64_t stride;
  explicit View(const ImageRows& rows) : v(static_cast<const T*>(rows.v)), stride(rows.stride) {}
  DDPM_FAST_HD float at(int64_t r, int64_t i) const { return widened(v[r * stride + i]); }
};

// Rows of an array where they lie, if `half` (it is bfloat16), else as float32, where they lie or in `scratch`.
inline ImageRows read_rows(const Array& array, const Rows& rows, bool half, float* scratch) {
  if (half) return {static_cast<const uint16_t*>(array.data) + rows.at, rows.stride};
  const FloatRows floats = load_rows(array, rows, scratch);
  return {floats.v, floats.stride};
}

// Calls body(output) and sees to it that what it wrote there is in the array.
template <typename Body>
void write_rows(const Array& array, const Rows& rows, bool half, float* scratch, const Body& body) {
  if (half) return body(OutputRows{static_cast<uint16_t*>(array.data) + rows.at, rows.stride});
  const StoreRows floats = begin_store_rows(array, rows, scratch);
  body(OutputRows{floats.v, floats.stride});
  store_rows(array, rows, floats);
}

}  // namespace ddpm_fast
