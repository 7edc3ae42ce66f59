// What the files of the Python module share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "kernels.h"

namespace ddpm_fast {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Array array(Address address, int dtype) { return {pointer<void>(address), static_cast<DType>(dtype)}; }

inline Shape shape_of(int64_t n, int64_t channels, int64_t inner, bool channels_last) {
  return {n, channels, inner, channels_last};
}

template <typename Args>
using CpuLauncher = Status (*)(const Args&, int);
template <typename Args>
using CudaLauncher = Status (*)(const Args&, int, void*);

template <typename Args>
void launch(const Args& args, int device, Address stream, CpuLauncher<Args> cpu, CudaLauncher<Args> cuda) {
  Status status;
  {
    pybind11::gil_scoped_release unlocked;
    status = device < 0 ? cpu(args, static_cast<int>(stream)) : cuda(args, device, pointer<void>(stream));
  }
  if (!status.ok()) throw std::runtime_error(status.message);
}

#if defined(DDPM_FAST_HAS_CUDA)
#define DDPM_FAST_LAUNCHERS(op) op##_cpu, op##_cuda
#else
template <typename Args>
Status not_built(const Args&, int, void*) {
  return {"this ddpm_fast was built without CUDA (no nvcc was found, or DDPM_FAST_CUDA=OFF)"};
}
#define DDPM_FAST_LAUNCHERS(op) op##_cpu, not_built
#endif

// bindings_norms.cpp, bindings_inference.cpp
void bind_norms(pybind11::module_& m);
void bind_inference(pybind11::module_& m);

}  // namespace ddpm_fast
