// Loads and stores: everything is float in registers, converted on the load line and on the store line. Neighbouring
// elements go in accesses of up to 128 bits; the launchers check with `aligned` that the pointers allow it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "work.cuh"

namespace ddpm_fast {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(uint8_t x) { return image_from_byte(x); }

__device__ inline void assign(float& to, float x) { to = x; }
__device__ inline void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ inline void assign(__half& to, float x) { to = __float2half_rn(x); }
__device__ inline void assign(uint8_t& to, float x) { to = byte_from_image(x); }

// N values of a thread. N elements of type T in memory are a Pack<T, N>; Word<T, N> is what one access of it moves.
template <int N>
struct Floats {
  float v[N];
  __device__ float& operator[](int i) { return v[i]; }
  __device__ float operator[](int i) const { return v[i]; }
};
using Quad = Floats<4>;

template <typename T, int N>
struct Pack {
  T v[N];
};

template <typename T, int N>
using Word = std::conditional_t<
    sizeof(T) * N == 16, uint4,
    std::conditional_t<sizeof(T) * N == 8, uint2, std::conditional_t<sizeof(T) * N == 4, uint32_t, void>>>;

template <int N, typename T>
__device__ inline Floats<N> load_pack(const T* at) {
  Floats<N> out;
  if constexpr (N == 1) {
    out[0] = to_float(*at);
  } else if constexpr (sizeof(T) * N > 16) {
    const Floats<N / 2> low = load_pack<N / 2>(at);
    const Floats<N / 2> high = load_pack<N / 2>(at + N / 2);
#pragma unroll
    for (int j = 0; j < N / 2; ++j) {
      out[j] = low[j];
      out[j + N / 2] = high[j];
    }
  } else {
    const auto pack = bits_as<Pack<T, N>>(*reinterpret_cast<const Word<T, N>*>(at));
#pragma unroll
    for (int j = 0; j < N; ++j)
      out[j] = to_float(pack.v[j]);
  }
  return out;
}

template <typename T, int N>
__device__ inline void store_pack(T* at, const Floats<N>& values) {
  if constexpr (N == 1) {
    assign(*at, values[0]);
  } else {
    Pack<T, N> pack;
#pragma unroll
    for (int j = 0; j < N; ++j)
      assign(pack.v[j], values[j]);
    *reinterpret_cast<Word<T, N>*>(at) = bits_as<Word<T, N>>(pack);
  }
}

// ---- the quad of a thread ----

template <typename T>
__device__ inline Quad load_quad(const T* data, const Run& at) {
  return load_pack<4>(data + at.offset);
}

template <typename T>
__device__ inline Quad load_quad(const T* data, const Scattered& at) {
  Quad out;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    out[j] = at.has(j) ? to_float(data[at.offset(j)]) : 0.0f;
  return out;
}

template <typename T>
__device__ inline void store_quad(T* data, const Run& at, const Quad& values) {
  store_pack(data + at.offset, values);
}

template <typename T>
__device__ inline void store_quad(T* data, const Scattered& at, const Quad& values) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (at.has(j)) assign(data[at.offset(j)], values[j]);
  }
}

// ---- arrays whose dtype is known at run time only ----

struct AnyFloat {};  // in place of a type: the array's dtype, a float
struct AnyImage {};  // and that, or uint8

template <typename T>
constexpr bool kIsAny = std::is_same_v<T, AnyFloat> || std::is_same_v<T, AnyImage>;

// Calls body(the array's data as a typed pointer). The branch is the same for all threads.
template <typename T, typename Body>
__device__ inline void with_data(const Array& array, const Body& body) {
  if constexpr (!kIsAny<T>) {
    body(static_cast<T*>(array.data));
  } else if (array.dtype == DType::f32) {
    body(static_cast<float*>(array.data));
  } else if (array.dtype == DType::bf16) {
    body(static_cast<__nv_bfloat16*>(array.data));
  } else if (std::is_same_v<T, AnyFloat> || array.dtype == DType::f16) {
    body(static_cast<__half*>(array.data));
  } else if constexpr (std::is_same_v<T, AnyImage>) {
    body(static_cast<uint8_t*>(array.data));
  }
}

template <typename T, int N>
__device__ inline Floats<N> load_at(const Array& array, int64_t offset) {
  Floats<N> out;
  with_data<T>(array, [&](const auto* data) { out = load_pack<N>(data + offset); });
  return out;
}

template <typename T, int N>
__device__ inline void store_at(const Array& array, int64_t offset, const Floats<N>& values) {
  with_data<T>(array, [&](auto* data) { store_pack(data + offset, values); });
}

__device__ inline float number_at(const Array& array, int64_t at) { return load_at<AnyFloat, 1>(array, at)[0]; }

template <typename T, typename Place>
__device__ inline Quad load_image(const Array& array, const Place& at) {
  Quad out;
  with_data<T>(array, [&](const auto* data) { out = load_quad(data, at); });
  return out;
}

template <typename T, typename Place>
__device__ inline void store_image(const Array& array, const Place& at, const Quad& values) {
  with_data<T>(array, [&](auto* data) { store_quad(data, at, values); });
}

// ---- host side: may the array be read in packs? ----

inline int size_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::u8 ? 1 : 2; }

// Whether packs of n elements, from multiples of n on, are aligned. A missing array is.
inline bool aligned(const Array& array, int n = 4) {
  const int bytes = size_of(array.dtype) * n;
  return reinterpret_cast<uintptr_t>(array.data) % static_cast<uintptr_t>(bytes < 16 ? bytes : 16) == 0;
}
inline bool aligned(const float* data, int n = 4) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(4 * n < 16 ? 4 * n : 16) == 0;
}

}  // namespace ddpm_fast
