// What the two files of the Python module share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "kernels.h"

namespace ddpm_fast {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Array array(Address address, int dtype) { return {pointer<void>(address), static_cast<DType>(dtype)}; }

// bindings_inference.cpp
void bind_inference(pybind11::module_& m);

}  // namespace ddpm_fast
