// bfloat16 of the CUDA kernels on the CPU: the upper half of a float, rounded to nearest even; NaN becomes 0x7FFF as on
// a GPU.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FFF};
  const uint32_t half_unit = 0x7FFFu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>((bits + half_unit) >> 16)};
}

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof bits);
  return out;
}
