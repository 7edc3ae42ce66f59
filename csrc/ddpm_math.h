// The scalar formulas of every op, once for C++ and CUDA. Operations run left to right, each rounded once (no fused
// multiply-add), so the results equal eager PyTorch in float32 bit for bit wherever only + - * / occur.
#pragma once

#include <cmath>

#include "portability.h"

namespace ddpm_fast {

DDPM_FAST_HD float not_a_number() { return bits_as<float>(0x7FC00000u); }

// clip that keeps NaN, as torch.clamp does; fminf/fmaxf would drop it.
DDPM_FAST_HD float clip(float x, float lo, float hi) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float y;  // the same in half the instructions
  asm("min.NaN.f32 %0, %1, %2;\n\tmax.NaN.f32 %0, %0, %3;" : "=&f"(y) : "f"(x), "f"(hi), "f"(lo));
  return y;
#else
  return x < lo ? lo : (x > hi ? hi : x);
#endif
}

// ---- exp and SiLU ----

// exp(x) = p 2^n with p in about [0.7, 1.42], for |x| <= 126. Cephes' polynomial; rounding x / ln 2 by adding 1.5 *
// 2^23 needs no float-to-int conversion and so is defined for NaN too.
struct ExpParts {
  float p;
  int32_t n;
};
DDPM_FAST_HD ExpParts exp_parts(float x) {
  const float shifted = x * 1.44269504088896341f + 12582912.0f;
  const float nf = shifted - 12582912.0f;
  const float r = (x - nf * 0.693359375f) - nf * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  return {p, static_cast<int32_t>(bits_as<uint32_t>(shifted) - 0x4B400000u)};
}

// 2^n for |n| <= 126, from its bits.
DDPM_FAST_HD float pow2(int32_t n) { return bits_as<float>((static_cast<uint32_t>(n) + 127u) << 23); }

// x 2^n in two exact steps, so that only a subnormal or overflowing result is rounded (once).
DDPM_FAST_HD float scale_pow2(float x, int32_t n) {
  const int32_t half = n >> 1;
  return x * pow2(half) * pow2(n - half);
}

DDPM_FAST_HD float exp_f32(float x) {
  const ExpParts e = exp_parts(clip(x, -126.0f, 126.0f));
  return scale_pow2(e.p, e.n);
}

// exp(a) = p low rest for a = -|v|, limited to -126: low and rest are powers of two, low >= 2^-126, and rest is 1
// unless exp(a) is subnormal. Half the work of exp_f32 for the same bits.
struct ExpOfMinusAbs {
  float a, p, low, rest;
};
DDPM_FAST_HD ExpOfMinusAbs exp_of_minus_abs(float v) {
  const float minus = -fabsf(v);
  const float a = minus < -126.0f ? -126.0f : minus;
  const ExpParts e = exp_parts(a);
  const int32_t low = e.n > -126 ? e.n : -126;
  return {a, e.p, pow2(low), pow2(e.n - low)};
}

// a where v is negative (-0 and NaN either way), else b. Made of bits on the CPU, because compilers turn several
// choices by one comparison into a branch, and then divide on both sides of it, or do not vectorise at all.
DDPM_FAST_HD float where_negative(float v, float a, float b) {
#if defined(__CUDA_ARCH__)
  return v < 0.0f ? a : b;
#else
  const uint32_t mask = static_cast<uint32_t>(bits_as<int32_t>(v) >> 31);
  return bits_as<float>((bits_as<uint32_t>(a) & mask) | (bits_as<uint32_t>(b) & ~mask));
#endif
}

// SiLU(v) = v / (1 + exp(-v)) = v exp(v) / (1 + exp(v)). exp is only taken of -|v|, and its power of two is applied
// last, so nothing overflows and the result is within 3 ulp down to the smallest subnormal. In the denominator low does
// for 2^n, because below it the sum is 1. SiLU(-inf) = -0.
DDPM_FAST_HD float silu(float v) {
  const ExpOfMinusAbs e = exp_of_minus_abs(v);
  const float ratio = where_negative(v, e.a * e.p, v) / (1.0f + e.p * e.low);
  return where_negative(v, ratio * e.rest * e.low, ratio);
}

// SiLU'(v) = s (1 + v (1 - s)) with s = 1 / (1 + exp(-v)).
DDPM_FAST_HD float silu_grad(float v) {
  const ExpOfMinusAbs parts = exp_of_minus_abs(v);
  const float e = parts.p * parts.rest * parts.low;
  const float denominator = 1.0f + e;
  const float big = 1.0f / denominator;
  const float small = e * big;
  const float s = where_negative(v, small, big);
  const float one_minus_s = where_negative(v, big, small);
  return s * (1.0f + where_negative(v, parts.a, v) * one_minus_s);
}

// ---- images ----

// uint8 -> [-1, 1]
DDPM_FAST_HD float image_from_byte(uint8_t byte) { return static_cast<float>(byte) / 127.5f - 1.0f; }

// [-1, 1] -> uint8, half to even, saturating, NaN to 0. Adding 2^23 rounds to an integer in the low mantissa bits.
DDPM_FAST_HD uint8_t byte_from_image(float x) {
  const float v = (x + 1.0f) * 127.5f;
  const float inside = v >= 0.0f ? (v > 255.0f ? 255.0f : v) : 0.0f;
  return static_cast<uint8_t>(bits_as<uint32_t>(inside + 8388608.0f) & 0xFFu);
}

// ---- q_sample (DDPM eq. 4) and its training targets ----

enum class Target : int32_t { none = 0, eps = 1, x0 = 2, v = 3 };

// One row of the noising table: signal = sqrt(alphas_cumprod_t), noise = sqrt(1 - alphas_cumprod_t).
struct NoisingRow {
  float signal, noise;
};

// Row t of the table. t outside: nothing is read, and NaN follows for that sample.
DDPM_FAST_HD NoisingRow noising_row(const float* table, int64_t steps, int64_t t) {
  if (t < 0 || t >= steps) return {not_a_number(), not_a_number()};
  return {table[2 * t], table[2 * t + 1]};
}

DDPM_FAST_HD float q_sample_value(NoisingRow row, float x0, float eps) { return row.signal * x0 + row.noise * eps; }

// v = sqrt(ab) eps - sqrt(1 - ab) x0 (Salimans & Ho 2022)
DDPM_FAST_HD float target_value(Target target, NoisingRow row, float x0, float eps) {
  return target == Target::eps ? eps : target == Target::x0 ? x0 : row.signal * eps - row.noise * x0;
}

// The transposed map: gradients of x_t and of the target pulled back to x0 and eps.
DDPM_FAST_HD float q_sample_grad_x0(Target target, NoisingRow row, float g_x_t, float g_target) {
  const float g = row.signal * g_x_t;
  return target == Target::x0 ? g + g_target : target == Target::v ? g - row.noise * g_target : g;
}
DDPM_FAST_HD float q_sample_grad_eps(Target target, NoisingRow row, float g_x_t, float g_target) {
  const float g = row.noise * g_x_t;
  return target == Target::eps ? g + g_target : target == Target::v ? g + row.signal * g_target : g;
}

// ---- noise_mse ----

enum class Loss : int32_t { mse = 0, l1 = 1, huber = 2 };

// huber: d^2 / 2 inside delta, delta (|d| - delta / 2) outside (Huber 1964, as torch.nn.functional.huber_loss)
DDPM_FAST_HD float loss_value(Loss loss, float d, float delta) {
  if (loss == Loss::mse) return d * d;
  const float a = fabsf(d);
  if (loss == Loss::l1) return a;
  return a < delta ? 0.5f * d * d : delta * (a - 0.5f * delta);
}

DDPM_FAST_HD float loss_grad(Loss loss, float d, float delta) {
  if (loss == Loss::mse) return 2.0f * d;
  const float limit = loss == Loss::l1 ? 1.0f : delta;
  if (loss == Loss::huber && fabsf(d) < delta) return d;
  return d > 0.0f ? limit : d < 0.0f ? -limit : d;  // sign(d); NaN stays NaN
}

// ---- ddpm_step ----

// One row of the step table; the meaning of the columns is derived in ddpm_fast/tables/steps.py.
struct StepRow {
  float a, b, c1, c2, c3, c4, s, clip;
};

// Classifier-free guidance (Ho & Salimans 2022): m_u + w (m - m_u).
DDPM_FAST_HD float guided(float m, float m_uncond, float w) { return m_uncond + w * (m - m_uncond); }

DDPM_FAST_HD float predicted_x0(const StepRow& row, float x, float m) {
  return clip(row.a * x - row.b * m, -row.clip, row.clip);
}

// Dynamic thresholding (Saharia et al. 2022): clip to the sample's own threshold, then divide by it.
DDPM_FAST_HD float predicted_x0(const StepRow& row, float x, float m, float threshold) {
  return clip(row.a * x - row.b * m, -threshold, threshold) / threshold;
}

// The mean of the step; the caller adds c4 x0_prev and s z.
DDPM_FAST_HD float step_mean(const StepRow& row, float x0, float x, float m) {
  return row.c1 * x0 + row.c2 * x + row.c3 * m;
}

// The standard deviation where the model predicts the variance; otherwise it is row.s.
DDPM_FAST_HD float learned_sigma(float logvar) { return exp_f32(0.5f * logvar); }

// The log variances between which a network chooses by v in [-1, 1] (Nichol & Dhariwal 2021, eq. 15).
struct LogvarRange {
  float min, max;
};
DDPM_FAST_HD float learned_sigma(const LogvarRange& range, float v) {
  const float f = 0.5f * (v + 1.0f);
  return learned_sigma(f * range.max + (1.0f - f) * range.min);
}

DDPM_FAST_HD bool is_finite(float x) { return fabsf(x) < bits_as<float>(0x7F800000u); }

}  // namespace ddpm_fast
