// Loading, storing and drawing of tiles.
#include "tile.h"

#include "../dispatch.h"
#include "../philox.h"

namespace ddpm_fast {
namespace {

DDPM_FAST_CLONES void widen_bf16(const uint16_t* in, float* out, int64_t count, int64_t stride) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i)
      out[i] = float_from_bf16(in[i]);
  } else {
    for (int64_t i = 0; i < count; ++i)
      out[i] = float_from_bf16(in[i * stride]);
  }
}

DDPM_FAST_CLONES void widen_f16(const uint16_t* in, float* out, int64_t count, int64_t stride) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i)
      out[i] = float_from_f16(in[i]);
  } else {
    for (int64_t i = 0; i < count; ++i)
      out[i] = float_from_f16(in[i * stride]);
  }
}

DDPM_FAST_CLONES void widen_u8(const uint8_t* in, float* out, int64_t count, int64_t stride) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = image_from_byte(in[i * stride]);
}

DDPM_FAST_CLONES void narrow_bf16(const float* in, uint16_t* out, int64_t count, int64_t stride) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i)
      out[i] = bf16_from_float(in[i]);
  } else {
    for (int64_t i = 0; i < count; ++i)
      out[i * stride] = bf16_from_float(in[i]);
  }
}

DDPM_FAST_CLONES void narrow_f16(const float* in, uint16_t* out, int64_t count, int64_t stride) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i)
      out[i] = f16_from_float(in[i]);
  } else {
    for (int64_t i = 0; i < count; ++i)
      out[i * stride] = f16_from_float(in[i]);
  }
}

DDPM_FAST_CLONES void narrow_u8(const float* in, uint8_t* out, int64_t count, int64_t stride) {
  for (int64_t i = 0; i < count; ++i)
    out[i * stride] = byte_from_image(in[i]);
}

void widen(const Array& array, int64_t at, float* out, int64_t count, int64_t stride) {
  switch (array.dtype) {
  case DType::f32: {
    const float* in = static_cast<const float*>(array.data) + at;
    for (int64_t i = 0; i < count; ++i)
      out[i] = in[i * stride];
    break;
  }
  case DType::bf16: return widen_bf16(static_cast<const uint16_t*>(array.data) + at, out, count, stride);
  case DType::f16: return widen_f16(static_cast<const uint16_t*>(array.data) + at, out, count, stride);
  case DType::u8: return widen_u8(static_cast<const uint8_t*>(array.data) + at, out, count, stride);
  }
}

void narrow(const Array& array, int64_t at, const float* in, int64_t count, int64_t stride) {
  switch (array.dtype) {
  case DType::f32: {
    float* out = static_cast<float*>(array.data) + at;
    for (int64_t i = 0; i < count; ++i)
      out[i * stride] = in[i];
    break;
  }
  case DType::bf16: return narrow_bf16(in, static_cast<uint16_t*>(array.data) + at, count, stride);
  case DType::f16: return narrow_f16(in, static_cast<uint16_t*>(array.data) + at, count, stride);
  case DType::u8: return narrow_u8(in, static_cast<uint8_t*>(array.data) + at, count, stride);
  }
}

// Calls piece(place in memory, place in the run, count, stride) for the pieces of a run that lie at one stride.
template <typename Piece>
void for_each_piece(const Shape& shape, const Run& run, const Piece& piece) {
  const int64_t base = run.n * shape.elements();
  if (!shape.channels_last) return piece(base + run.first, 0, run.count, 1);
  int64_t channel = run.first / shape.inner;
  int64_t place = run.first % shape.inner;
  for (int64_t done = 0; done < run.count; ++channel, place = 0) {
    const int64_t count = std::min(run.count - done, shape.inner - place);
    piece(base + place * shape.channels + channel, done, count, shape.channels);
    done += count;
  }
}

bool in_place(const Array& array, const Shape& shape) { return array.dtype == DType::f32 && !shape.channels_last; }

float* place_of(const Array& array, const Shape& shape, const Run& run) {
  return static_cast<float*>(array.data) + run.n * shape.elements() + run.first;
}

DDPM_FAST_CLONES void normal_quads(
    uint64_t seed, uint64_t sample, uint32_t stream, uint32_t first_quad, int64_t quads, float* __restrict__ z
) {
  for (int64_t q = 0; q < quads; ++q) {
    normal_quad(seed, sample, stream, first_quad + static_cast<uint32_t>(q), z + 4 * q);
  }
}

// Adds strength * normal(seed, sample, stream, channel) to each element of a run.
void add_offset_noise(const Noise& noise, const Shape& shape, const Run& run, float* z) {
  const uint64_t seed = static_cast<uint64_t>(noise.rng[0]);
  const uint64_t sample = static_cast<uint64_t>(noise.rng[1]) + static_cast<uint64_t>(run.n);
  int64_t channel = run.first / shape.inner;
  int64_t place = run.first % shape.inner;
  float quad[4];
  int64_t drawn = -1;
  for (int64_t done = 0; done < run.count; ++channel, place = 0) {
    if (channel / 4 != drawn) {
      drawn = channel / 4;
      normal_quad(seed, sample, noise.offset_stream, static_cast<uint32_t>(drawn), quad);
    }
    const float offset = noise.offset_strength * quad[channel % 4];
    const int64_t count = std::min(run.count - done, shape.inner - place);
    for (int64_t i = done; i < done + count; ++i)
      z[i] += offset;
    done += count;
  }
}

}  // namespace

const float* load(const Array& array, const Shape& shape, const Run& run, Tile& scratch) {
  if (in_place(array, shape)) return place_of(array, shape, run);
  for_each_piece(shape, run, [&](int64_t at, int64_t i, int64_t count, int64_t stride) {
    widen(array, at, scratch.v + i, count, stride);
  });
  return scratch.v;
}

const float* load(const float* array, const Shape& shape, const Run& run, Tile& scratch) {
  return load(Array{const_cast<float*>(array), DType::f32}, shape, run, scratch);
}

float* begin_store(const Array& array, const Shape& shape, const Run& run, Tile& scratch) {
  return in_place(array, shape) ? place_of(array, shape, run) : scratch.v;
}

void store(const Array& array, const Shape& shape, const Run& run, const float* values) {
  if (in_place(array, shape) && values == place_of(array, shape, run)) return;
  for_each_piece(shape, run, [&](int64_t at, int64_t i, int64_t count, int64_t stride) {
    narrow(array, at, values + i, count, stride);
  });
}

FloatRows load_rows(const Array& array, const Rows& rows, float* scratch) {
  if (array.dtype == DType::f32) return {static_cast<const float*>(array.data) + rows.at, rows.stride};
  if (rows.stride == rows.length) {
    widen(array, rows.at, scratch, rows.count * rows.length, 1);
  } else {
    for (int64_t r = 0; r < rows.count; ++r)
      widen(array, rows.at + r * rows.stride, scratch + r * rows.length, rows.length, 1);
  }
  return {scratch, rows.length};
}

StoreRows begin_store_rows(const Array& array, const Rows& rows, float* scratch) {
  if (array.dtype == DType::f32) return {static_cast<float*>(array.data) + rows.at, rows.stride};
  return {scratch, rows.length};
}

void store_rows(const Array& array, const Rows& rows, const StoreRows& values) {
  if (array.dtype == DType::f32) return;
  if (rows.stride == rows.length) {
    narrow(array, rows.at, values.v, rows.count * rows.length, 1);
  } else {
    for (int64_t r = 0; r < rows.count; ++r)
      narrow(array, rows.at + r * rows.stride, values.v + r * rows.length, rows.length, 1);
  }
}

std::vector<float> as_floats(const Array& array, int64_t count, float missing) {
  std::vector<float> out(static_cast<size_t>(count), missing);
  if (array) widen(array, 0, out.data(), count, 1);
  return out;
}

DDPM_FAST_CLONES double sum_of(const float* a, int64_t count) {
  constexpr int kLanes = 32;
  double lanes[kLanes] = {};
  const int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int k = 0; k < kLanes; ++k)
      lanes[k] += static_cast<double>(a[i + k]);
  }
  for (int64_t i = whole; i < count; ++i)
    lanes[i - whole] += static_cast<double>(a[i]);
  double sum = 0.0;
  for (int k = 0; k < kLanes; ++k)
    sum += lanes[k];
  return sum;
}

void normal_tile(uint64_t seed, uint64_t sample, uint32_t stream, int64_t first, int64_t count, float* z) {
  const uint32_t first_quad = static_cast<uint32_t>(first / 4);
  const int64_t whole = count / 4;
  normal_quads(seed, sample, stream, first_quad, whole, z);
  if (count % 4 != 0) {
    float last[4];
    normal_quad(seed, sample, stream, first_quad + static_cast<uint32_t>(whole), last);
    for (int64_t i = 4 * whole; i < count; ++i)
      z[i] = last[i - 4 * whole];
  }
}

const float* load_noise(const Noise& noise, const Shape& shape, const Run& run, Tile& scratch) {
  const float* z = scratch.v;
  if (noise.values != nullptr) {
    z = load(noise.values, shape, run, scratch);
  } else {
    const uint64_t sample = static_cast<uint64_t>(noise.rng[1]) + static_cast<uint64_t>(run.n);
    normal_tile(static_cast<uint64_t>(noise.rng[0]), sample, noise.stream, run.first, run.count, scratch.v);
  }
  if (noise.offset_strength != 0.0f) {
    if (z != scratch.v) std::copy(z, z + run.count, scratch.v);
    add_offset_noise(noise, shape, run, scratch.v);
    z = scratch.v;
  }
  return z;
}

}  // namespace ddpm_fast
