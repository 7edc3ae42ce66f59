// Sums in float32 that are the same every time and hardly round: each thread adds its share and keeps the remainders,
// then the threads of a group are added as a tree. No atomics.
#pragma once

#include "launch.cuh"

namespace ddpm_fast {

// A running sum that keeps what each addition rounds away (Knuth's two-sum).
struct Sum {
  float value = 0.0f, lost = 0.0f;
  __device__ void add(float x) {
    const float sum = value + x;
    const float taken = sum - value;
    lost = lost + ((value - (sum - taken)) + (x - taken));
    value = sum;
  }
  // An infinite or NaN sum has a NaN remainder.
  __device__ float total() const { return is_finite(lost) ? value + lost : value; }
};

__device__ inline float sum_of(const Floats<1>& one) { return one[0]; }
__device__ inline float sum_of(const Quad& q) { return (q[0] + q[1]) + (q[2] + q[3]); }
__device__ inline float sum_of(const Floats<8>& x) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// The sum over each group of kGroup neighbouring threads, in its first thread. All threads of the block must call it.
template <int kGroup>
__device__ float group_sum(float value) {
  constexpr int kLanes = kGroup < 32 ? kGroup : 32;
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    value = value + __shfl_down_sync(0xFFFFFFFFu, value, step, kLanes);
  if constexpr (kGroup > 32) {
    static_assert(kGroup == kThreads, "a group is part of a warp, or the block");
    constexpr int kWarps = kThreads / 32;
    __shared__ float of_warp[kWarps];
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
    __syncthreads();
    value = threadIdx.x < kWarps ? of_warp[threadIdx.x] : 0.0f;
    __syncthreads();  // of_warp may be written again by the next call
    if (threadIdx.x < 32) {
#pragma unroll
      for (int step = kWarps / 2; step > 0; step /= 2)
        value = value + __shfl_down_sync(0xFFFFFFFFu, value, step);
    }
  }
  return value;
}

}  // namespace ddpm_fast
