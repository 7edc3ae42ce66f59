// The part of the CUDA runtime and language that csrc/cuda uses, as plain C++17, so that the kernels run without a GPU.
// For tests only; found instead of CUDA's header of the same name because this folder is on the include path.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>

#include "lanes.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time; AddressSanitizer watches what is not thread_local

struct alignas(8) uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 blockIdx;
// A lane's own index: read through the block, because lanes take turns.
struct LaneIndex {
  struct X {
    operator unsigned() const { return static_cast<unsigned>(cuda_on_cpu::block.lane()); }
  } x;
};
inline constexpr LaneIndex threadIdx;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevice = 101 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline std::mutex one_launch_at_a_time;

template <typename... Params, typename... Values>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), const Values&... values) {
  if (config->gridDim.x == 0 || config->gridDim.x > 0x7FFFFFFFu || config->blockDim.x > 1024)
    return cudaErrorInvalidConfiguration;
  const std::lock_guard<std::mutex> turn(one_launch_at_a_time);
  for (unsigned i = 0; i < config->gridDim.x; ++i) {
    blockIdx = {i, 0, 0};
    cuda_on_cpu::block.run(static_cast<int>(config->blockDim.x), [&](int) { kernel(values...); });
  }
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess              ? "no error"
         : error == cudaErrorInvalidDevice ? "invalid device ordinal"
                                           : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}

inline void __syncthreads() { cuda_on_cpu::block.barrier(); }

inline float __shfl_down_sync(unsigned mask, float value, int delta, int width = cuda_on_cpu::kWarp) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = cuda_on_cpu::block.shuffle_down(mask, bits, delta, width);
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

inline float __shfl_sync(unsigned mask, float value, int source, int width = cuda_on_cpu::kWarp) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const int segment = cuda_on_cpu::block.lane() % cuda_on_cpu::kWarp / width * width;
  bits = cuda_on_cpu::block.shuffle(mask, bits, segment + source % width);
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

inline int atomicCAS(int* address, int compare, int value) {
  const int old = *address;
  if (old == compare) *address = value;
  return old;
}
