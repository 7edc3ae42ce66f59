// What every launcher does: choose the device, cut the work into launches, launch, report errors as a Status.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "pack.cuh"

namespace ddpm_fast {

constexpr int kThreads = 256;  // of every block of every kernel

__device__ inline uint32_t thread_index() { return blockIdx.x * kThreads + threadIdx.x; }

inline Status status_of(cudaError_t error) {
  return error == cudaSuccess ? Status{} : Status{cudaGetErrorString(error)};
}

// Runs body(), which returns a Status, with `device` current, and puts back the device that was.
template <typename Body>
Status on_device(int device, const Body& body) {
  int previous = device;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) {
    cudaGetLastError();  // CUDA remembers an error until asked, and the next caller of another library would find it
    return status_of(error);
  }
  const Status status = body();
  if (previous != device) cudaSetDevice(previous);
  return status;
}

// The one place where a kernel starts: one thread per item, in blocks of kThreads.
template <typename... Params, typename... Values>
Status launch(void (*kernel)(Params...), int64_t threads, void* stream, const Values&... values) {
  if (threads <= 0) return {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, values...);
  if (error != cudaSuccess) cudaGetLastError();
  return status_of(error);
}

// Calls launch_one(Work) for ranges of samples such that no launch has 2^31 threads or more.
template <typename LaunchOne>
Status for_each_launch(int device, const Shape& shape, int64_t threads_per_sample, const LaunchOne& launch_one) {
  if (shape.n <= 0 || threads_per_sample <= 0) return {};
  if (shape.elements() > kMaxElements || threads_per_sample > kMaxThreads)
    return {"on CUDA a sample may have at most 2147483644 elements"};
  return on_device(device, [&] {
    const int64_t most = kMaxThreads / threads_per_sample;
    for (int64_t first = 0; first < shape.n; first += most) {
      const int64_t samples = shape.n - first < most ? shape.n - first : most;
      const Status status = launch_one(Work(shape, first, samples, threads_per_sample));
      if (!status.ok()) return status;
    }
    return Status{};
  });
}

// Calls body(T()) with the C++ type of a float dtype, so that the kernel of that type is chosen on the host.
template <typename Body>
Status with_float_type(DType dtype, const Body& body) {
  switch (dtype) {
  case DType::f32: return body(float());
  case DType::bf16: return body(__nv_bfloat16());
  case DType::f16: return body(__half());
  case DType::u8: break;
  }
  return {"this array must be float32, bfloat16 or float16"};
}

}  // namespace ddpm_fast
