// float32 <-> bfloat16, float16, uint8 on the CPU, a tile at a time. Branch-free bit arithmetic, so that the loops
// vectorise on every instruction set; rounding is to nearest, ties to even, subnormals included, as in PyTorch.
#pragma once

#include "kernels.h"

namespace ddpm_fast {

DDPM_FAST_HD float float_from_bf16(uint16_t h) { return bits_as<float>(static_cast<uint32_t>(h) << 16); }

DDPM_FAST_HD uint16_t bf16_from_float(float f) {
  const uint32_t u = bits_as<uint32_t>(f);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const bool nan = (u & 0x7FFFFFFFu) > 0x7F800000u;
  return static_cast<uint16_t>(nan ? 0x7FC0u : rounded);
}

DDPM_FAST_HD float float_from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7FFFu) << 13;
  // Multiplying by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals, exactly.
  const float scaled = bits_as<float>(magnitude) * bits_as<float>(0x77800000u);
  const bool special = magnitude >= 0x0F800000u;  // infinity and NaN
  const uint32_t bits = special ? (magnitude | 0x7F800000u) : bits_as<uint32_t>(scaled);
  return bits_as<float>(bits | sign);
}

DDPM_FAST_HD uint16_t f16_from_float(float f) {
  const uint32_t u = bits_as<uint32_t>(f);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7FFFFFFFu;
  // Results below 2^-14 are subnormal: adding 1/2 lets the float adder round them at the right bit.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t normal = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return static_cast<uint16_t>(sign | (magnitude >= 0x477FF000u ? special : finite));
}

}  // namespace ddpm_fast
