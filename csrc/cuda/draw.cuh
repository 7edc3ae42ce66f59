// The noise of a thread's quad, and the rows of the tables that the device picks by itself.
#pragma once

#include "../philox.h"
#include "pack.cuh"

namespace ddpm_fast {

__device__ inline uint64_t seed_of(const Noise& noise) { return static_cast<uint64_t>(noise.rng[0]); }
__device__ inline uint64_t sample_of(const Noise& noise, int64_t row) {
  return static_cast<uint64_t>(noise.rng[1]) + static_cast<uint64_t>(row);
}

template <typename Place>
__device__ inline Quad drawn_quad(const Noise& noise, uint32_t stream, const Place& at) {
  Quad z;
  normal_quad(seed_of(noise), sample_of(noise, at.sample), stream, at.quad, z.v);
  return z;
}

// Adds strength * normal(seed, sample, offset_stream, channel) to each element. The channels of a quad are mostly one.
__device__ inline void add_offset_noise(const Noise& noise, const Scattered& at, Quad& z) {
#pragma unroll 1
  for (uint32_t channel = at.channel[0]; channel <= at.channel[3]; ++channel) {
    float drawn[4];
    normal_quad(seed_of(noise), sample_of(noise, at.sample), noise.offset_stream, channel / 4, drawn);
    const uint32_t k = channel % 4;
    const float offset = noise.offset_strength * (k == 0 ? drawn[0] : k == 1 ? drawn[1] : k == 2 ? drawn[2] : drawn[3]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (at.channel[j] == channel) z[j] = z[j] + offset;
    }
  }
}

// The standard normals of an op, offset noise included (which comes to Scattered kernels only).
template <typename Place>
__device__ inline Quad noise_quad(const Noise& noise, uint32_t stream, const Place& at) {
  Quad z = noise.values != nullptr ? load_quad(noise.values, at) : drawn_quad(noise, stream, at);
  if constexpr (Place::kScattered) {
    if (noise.offset_strength != 0.0f) add_offset_noise(noise, at, z);
  }
  return z;
}

// Whether Run serves: no channel matters and every sample begins at a multiple of 4 elements.
inline bool in_runs(const Shape& shape, const Noise& noise) {
  const bool drawn = noise.values == nullptr && noise.rng != nullptr;
  const bool one_format = !shape.channels_last || shape.channels == 1 || shape.inner == 1;
  return shape.elements() % 4 == 0 && (one_format || !drawn) && noise.offset_strength == 0.0f && aligned(noise.values);
}

}  // namespace ddpm_fast
