// SiLU for the loops of the norms over rows, where no bits are promised: what only matters below 1e-36 is left out.
#pragma once

#include "../ddpm_math.h"

namespace ddpm_fast {

// exp(-v) for |v| <= 87.3 (further out, that of the bound), where the power of two is a normal number.
constexpr float kBound = 87.3f;
DDPM_FAST_HD float exp_of_minus(float v) {
  const ExpParts e = exp_parts(v > kBound ? -kBound : -v);
  return e.p * pow2(e.n);
}
DDPM_FAST_HD float bounded(float v) { return v < -kBound ? -kBound : v; }

// v / (1 + exp(-v)) within 3 ulp down to v = -87.3, and -1e-36 below
DDPM_FAST_HD float silu_of(float v) {
  const float w = bounded(v);
  return w / (1.0f + exp_of_minus(w));
}

// s (1 + v (1 - s)) with s = 1 / (1 + exp(-v))
DDPM_FAST_HD float silu_gradient_of(float v) {
  const float w = bounded(v), e = exp_of_minus(w), s = 1.0f / (1.0f + e);
  return s * (1.0f + w * (e * s));
}

}  // namespace ddpm_fast
