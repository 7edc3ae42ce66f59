// Vec: 16 floats in as many registers as the instruction set of this file needs. Included by isa_*.cpp only, inside
// their anonymous namespaces; DDPM_FAST_VECTOR_BYTES says how wide a register is.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kRegisters = 64 / DDPM_FAST_VECTOR_BYTES;
typedef float Register __attribute__((vector_size(DDPM_FAST_VECTOR_BYTES)));
typedef int32_t IntRegister __attribute__((vector_size(DDPM_FAST_VECTOR_BYTES)));
constexpr int kLanes = DDPM_FAST_VECTOR_BYTES / 4;
constexpr int kVecLanes = 16;

inline __attribute__((always_inline)) Register splat_register(float s) {
#if DDPM_FAST_VECTOR_BYTES == 64
  return (Register)_mm512_set1_ps(s);
#elif DDPM_FAST_VECTOR_BYTES == 32
  return (Register)_mm256_set1_ps(s);
#else
  return Register{s, s, s, s};
#endif
}

inline __attribute__((always_inline)) Register load_register(const float* p) {
  Register r;
  std::memcpy(&r, p, sizeof r);
  return r;
}

inline __attribute__((always_inline)) void store_register(float* p, Register r) { std::memcpy(p, &r, sizeof r); }

struct Vec {
  Register r[kRegisters];
};

#define DDPM_FAST_EACH for (int i = 0; i < kRegisters; ++i)
#define DDPM_FAST_VEC inline __attribute__((always_inline)) Vec

DDPM_FAST_VEC operator+(Vec a, Vec b) {
  DDPM_FAST_EACH a.r[i] += b.r[i];
  return a;
}
DDPM_FAST_VEC operator-(Vec a, Vec b) {
  DDPM_FAST_EACH a.r[i] -= b.r[i];
  return a;
}
DDPM_FAST_VEC operator*(Vec a, Vec b) {
  DDPM_FAST_EACH a.r[i] *= b.r[i];
  return a;
}
DDPM_FAST_VEC splat(float s) {
  Vec v;
  DDPM_FAST_EACH v.r[i] = splat_register(s);
  return v;
}
// The larger; where either is NaN, b.
DDPM_FAST_VEC larger(Vec a, Vec b) {
  DDPM_FAST_EACH a.r[i] = a.r[i] > b.r[i] ? a.r[i] : b.r[i];
  return a;
}
DDPM_FAST_VEC smaller(Vec a, Vec b) {
  DDPM_FAST_EACH a.r[i] = a.r[i] < b.r[i] ? a.r[i] : b.r[i];
  return a;
}

// e^(kSign x) for kSign 1 or -1: 2^n 2^f with n an integer, |f| <= 1/2 and a polynomial for 2^f. Relative error below
// 3e-7 (without a fused multiply-add 3e-6 far from zero); for bfloat16, which rounds to 2e-3, below 1e-4 in fewer
// instructions. A NaN stays one. Without AVX512 |x| must not exceed 87.
#if DDPM_FAST_VECTOR_BYTES == 64
template <int kSign>
DDPM_FAST_VEC power_of_e(Vec a) {
  const __m512 x = (__m512)a.r[0], log2e = _mm512_set1_ps(kSign * 1.44269502f);
  const __m512 exponent = _mm512_mul_ps(x, log2e), n = _mm512_roundscale_ps(exponent, 8);
#if DDPM_FAST_HALF
  const __m512 f = _mm512_sub_ps(exponent, n);
  __m512 p = _mm512_set1_ps(0.0551716685f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.242611125f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693260968f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.999928057f));
#else
  __m512 f = _mm512_fmsub_ps(x, log2e, n);
  f = _mm512_fmadd_ps(x, _mm512_set1_ps(kSign * 1.92596303e-8f), f);  // what is left of log2(e)
  __m512 p = _mm512_set1_ps(0.000153457659f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.00133999309f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.00961848907f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0555032864f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240226462f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693147182f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
#endif
  a.r[0] = (Register)_mm512_scalef_ps(p, n);
  return a;
}

// a / (1 + e^-a); for bfloat16 with the processor's own reciprocal, good to 6e-5.
DDPM_FAST_VEC silu(Vec a) {
  const __m512 x = (__m512)a.r[0], one = _mm512_set1_ps(1.0f);
  __m512 sum = _mm512_add_ps(one, (__m512)power_of_e<-1>(a).r[0]);
#if DDPM_FAST_HALF
  const __m512 factor = _mm512_rcp14_ps(sum);
#else
  // The bound keeps infinity out of the Newton step; the sum comes second, so that a NaN passes.
  sum = _mm512_min_ps(_mm512_set1_ps(1e30f), sum);
  const __m512 guess = _mm512_rcp14_ps(sum);
  const __m512 factor = _mm512_fmadd_ps(guess, _mm512_fnmadd_ps(sum, guess, one), guess);
#endif
  a.r[0] = (Register)_mm512_mul_ps(x, factor);
  return a;
}
#else
template <int kSign>
DDPM_FAST_VEC power_of_e(Vec x) {
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
  const Vec shifted = x * splat(kSign * 1.44269502f) + shift;
  const Vec n = shifted - shift;
  const Vec f = (x * splat(kSign * 1.44140625f) - n) + x * splat(kSign * 1.28879089e-3f);
  Vec p = splat(0.000153457659f);
  p = p * f + splat(0.00133999309f);
  p = p * f + splat(0.00961848907f);
  p = p * f + splat(0.0555032864f);
  p = p * f + splat(0.240226462f);
  p = p * f + splat(0.693147182f);
  p = p * f + splat(1.0f);
  DDPM_FAST_EACH {
    const IntRegister power = (IntRegister)shifted.r[i] << 23;
    p.r[i] = (Register)((IntRegister)p.r[i] + power);
  }
  return p;
}

DDPM_FAST_VEC silu(Vec a) {
  // Beyond 64 the factor is 1, or so small that the product vanishes.
  const Vec e = power_of_e<-1>(larger(splat(-64.0f), smaller(splat(64.0f), a)));
  DDPM_FAST_EACH a.r[i] /= splat_register(1.0f) + e.r[i];
  return a;
}
#endif

DDPM_FAST_VEC load(const float* p) {
  Vec v;
  DDPM_FAST_EACH v.r[i] = load_register(p + i * kLanes);
  return v;
}
inline __attribute__((always_inline)) void store(float* p, Vec v) {
  DDPM_FAST_EACH store_register(p + i * kLanes, v.r[i]);
}

// All sixteen joined into one.
#if DDPM_FAST_VECTOR_BYTES == 64
inline __attribute__((always_inline)) float largest(Vec v) { return _mm512_reduce_max_ps((__m512)v.r[0]); }
inline __attribute__((always_inline)) float total(Vec v) { return _mm512_reduce_add_ps((__m512)v.r[0]); }
#else
template <typename Join>
inline __attribute__((always_inline)) float joined(Vec v, const Join& join) {
  float x[kVecLanes];
  store(x, v);
#pragma GCC unroll 4
  for (int half = kVecLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      x[i] = join(x[i], x[i + half]);
  return x[0];
}
inline __attribute__((always_inline)) float largest(Vec v) {
  return joined(v, [](float a, float b) { return a > b ? a : b; });
}
inline __attribute__((always_inline)) float total(Vec v) {
  return joined(v, [](float a, float b) { return a + b; });
}
#endif

#if DDPM_FAST_HALF
struct BFloat16 {
  uint16_t bits;
};
using Value = BFloat16;

DDPM_FAST_VEC load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  Vec v;
  v.r[0] = (Register)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  return v;
}
// Rounds to nearest, ties to even.
inline __attribute__((always_inline)) void store(BFloat16* p, Vec v) {
  const __m256bh bits = _mm512_cvtneps_pbh((__m512)v.r[0]);
  std::memcpy(p, &bits, sizeof bits);
}
#else
using Value = float;
#endif

}  // namespace
