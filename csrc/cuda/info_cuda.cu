// cuda_info: what the CUDA half sees on this machine, for `python -m ddpm_fast`. Works without a driver.
#include <cuda_runtime.h>

#include "../kernels.h"

namespace ddpm_fast {

CudaInfo cuda_info() {
  CudaInfo info;
  cudaRuntimeGetVersion(&info.runtime_version);
  cudaDriverGetVersion(&info.driver_version);
  const cudaError_t error = cudaGetDeviceCount(&info.device_count);
  if (error != cudaSuccess) {
    info.error = cudaGetErrorString(error);
    info.device_count = 0;
    cudaGetLastError();
  }
  return info;
}

}  // namespace ddpm_fast
