// What the lanes must do, and what must end the process; run by tests/test_cuda_on_cpu.py. The argument is the case.
#include <cmath>
#include <cstdlib>
#include <string_view>

#include "cuda_runtime.h"

namespace {

constexpr int kThreads = 256;

// The sum of in[0..255], by way of shuffles and shared memory, with a fault if one is named.
__global__ void sum_kernel(const float* in, float* out, std::string_view fault) {
  __shared__ float of_warps[kThreads / 32];
  const int lane = static_cast<int>(threadIdx.x);
  if (fault == "lane that ends" && lane == 77) return;
  float sum = in[fault == "beyond the input" ? lane + 1 : lane];
  for (int delta = 16; delta > 0; delta /= 2)
    sum += __shfl_down_sync(0xFFFFFFFFu, sum, delta);
  float* of_warp = of_warps + lane / 32 + (fault == "beyond shared memory" ? 1 : 0);
  if (lane % 32 == 0) *of_warp = sum;
  if (fault != "no barrier") __syncthreads();
  if (fault == "half a shuffle" && lane % 2 == 0) __shfl_sync(0xFFFFFFFFu, sum, 0);
  if (lane == 0) {
    float total = 0.0f;
    for (const float part : of_warps)
      total += part;
    out[blockIdx.x] = total;
  }
  __syncthreads();
  if (lane < kThreads / 32) of_warps[lane] = NAN;
}

}  // namespace

int main(int, char** arguments) {
  constexpr unsigned kBlocks = 4;
  auto* in = static_cast<float*>(std::malloc(kThreads * sizeof(float)));
  float out[kBlocks] = {};
  for (int i = 0; i < kThreads; ++i)
    in[i] = static_cast<float>(i);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kBlocks);
  config.blockDim = dim3(kThreads);
  cudaLaunchKernelEx(
      &config, sum_kernel, static_cast<const float*>(in), static_cast<float*>(out), std::string_view(arguments[1])
  );
  std::free(in);
  for (const float sum : out) {
    if (sum != 32640.0f) {
      std::printf("a sum is %g, not 32640\n", sum);
      return 1;
    }
  }
  return 0;
}
