// normal(seed, sample, stream, element): the noise of the whole library, one function for every backend.
//
// Philox4x32-10 (Salmon et al. 2011) turns (quad, sample, stream) under the 64-bit seed into four uint32; Box-Muller
// turns them into four normals. Each line below is one correctly rounded IEEE float32 (or exact uint32) operation. The
// order is part of the definition: NumPy (ddpm_fast/noise.py) and Triton do the same operations and so give the same
// bits. This holds only without fused multiply-add, hence -ffp-contract=off and --fmad=false in CMakeLists.txt.
#pragma once

#include <cmath>

#include "portability.h"

namespace ddpm_fast {

DDPM_FAST_HD uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t p;  // left to itself nvcc adds a zero to each upper half: 18 instructions more in a Philox
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(p) : "r"(a), "r"(b));
  return p;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

// The counter (c0, c1, c2, c3) is replaced by four random uint32.
DDPM_FAST_HD void philox4x32_10(uint64_t seed, uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3) {
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDACC__)
#pragma unroll
#elif defined(__GNUC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = wide_product(0xD2511F53u, c0);
    const uint64_t p1 = wide_product(0xCD9E8D57u, c2);
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Natural logarithm for u in (0, 1]: u = m 2^e with m in [sqrt(1/2), sqrt(2)), then a polynomial of degree 8 in m - 1.
DDPM_FAST_HD float log_unit(float u) {
  const int32_t bits = bits_as<int32_t>(u);
  const int32_t e = (bits - 0x3F3504F3) >> 23;
  const float m = bits_as<float>(static_cast<int32_t>(static_cast<uint32_t>(bits) - (static_cast<uint32_t>(e) << 23)));
  const float x = m - 1.0f;
  const float z = x * x;
  float p = 7.0376836292e-2f;
  p = p * x + -1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x + -1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x + -1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x + -2.4999993993e-1f;
  p = p * x + 3.3333331174e-1f;
  const float ef = static_cast<float>(e);
  float y = x * z * p;
  y = y + ef * -2.12194440e-4f;  // the low part of ln 2
  y = y - 0.5f * z;
  return (x + y) + ef * 0.693359375f;  // the high part of ln 2: exact for any e
}

// sin and cos of 2 pi r / 2^32. The quadrant is in the top bits, so the range reduction is exact integer arithmetic.
DDPM_FAST_HD void sincos_turn(uint32_t r, float& sin_out, float& cos_out) {
  const uint32_t quadrant = (r + 0x20000000u) >> 30;
  const float t = static_cast<float>(static_cast<int32_t>(r - (quadrant << 30))) * 1.4629180792671596e-9f;
  const float z = t * t;
  const float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z + -1.6666654611e-1f) * z * t + t;
  const float c =
      ((2.443315711809948e-5f * z + -1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f;
  const bool odd = (quadrant & 1u) != 0u;
  const float sin_abs = odd ? c : s;
  const float cos_abs = odd ? s : c;
  // Flipping the sign bit is the negation of the specification without a branch.
  sin_out = bits_as<float>(bits_as<uint32_t>(sin_abs) ^ ((quadrant & 2u) << 30));
  cos_out = bits_as<float>(bits_as<uint32_t>(cos_abs) ^ (((quadrant + 1u) & 2u) << 30));
}

// Two independent normals from two uint32; |z| <= 6.77.
DDPM_FAST_HD void box_muller(uint32_t a, uint32_t b, float& z0, float& z1) {
  const float u = static_cast<float>(a) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;
  const float radius = sqrtf(-2.0f * log_unit(u));
  float s, c;
  sincos_turn(b, s, c);
  z0 = radius * c;
  z1 = radius * s;
}

// The four uint32 of elements 4 quad ... 4 quad + 3 of one sample.
DDPM_FAST_HD void bits_quad(uint64_t seed, uint64_t sample, uint32_t stream, uint32_t quad, uint32_t out[4]) {
  out[0] = quad;
  out[1] = static_cast<uint32_t>(sample);
  out[2] = static_cast<uint32_t>(sample >> 32);
  out[3] = stream;
  philox4x32_10(seed, out[0], out[1], out[2], out[3]);
}

// The four normals of elements 4 quad ... 4 quad + 3 of one sample.
DDPM_FAST_HD void normal_quad(uint64_t seed, uint64_t sample, uint32_t stream, uint32_t quad, float z[4]) {
  uint32_t r[4];
  bits_quad(seed, sample, stream, quad, r);
  box_muller(r[0], r[1], z[0], z[1]);
  box_muller(r[2], r[3], z[2], z[3]);
}

}  // namespace ddpm_fast
