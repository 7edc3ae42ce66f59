// bfloat16 and IEEE half as bits; rounding to nearest even, every NaN becomes 0x7FFF as on the GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ptx {

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

inline float from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25)
                          : std::ldexp(static_cast<float>(mantissa), -24));
}

inline uint16_t to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return 0x7FFF;
  if (magnitude >= 65520.0f) return sign | 0x7C00;
  if (magnitude < 0x1p-14f)  // multiples of 2^-24; nearbyint rounds ties to even
    return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
  bits = (bits & 0x7FFFFFFFu) + 0xFFFu + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((bits >> 13) - (112 << 10));
}

}  // namespace ptx
