// float16 of the CUDA kernels on the CPU: the compiler's own type, which rounds to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline __half __float2half_rn(float x) {
  const _Float16 rounded = static_cast<_Float16>(x);
  __half out;
  std::memcpy(&out.bits, &rounded, sizeof out.bits);
  return out;
}

inline float __half2float(__half x) {
  _Float16 value;
  std::memcpy(&value, &x.bits, sizeof x.bits);
  return static_cast<float>(value);
}
