// What has to be spelled differently for nvcc, for GCC/Clang and for the CPU build of the CUDA kernels.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DDPM_FAST_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define DDPM_FAST_HD inline __attribute__((always_inline))
#else
#define DDPM_FAST_HD inline
#endif

namespace ddpm_fast {

// The bits of a value as another type of the same size; compiles to nothing.
template <typename To, typename From>
DDPM_FAST_HD To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "bits_as needs types of one size");
  To out;
  memcpy(&out, &value, sizeof(To));
  return out;
}

}  // namespace ddpm_fast
