// Tiles: short runs of elements of one sample, as float32 in the L1 cache. An op loads tiles, computes in float32 and
// stores tiles, so that its loop knows neither dtypes nor memory formats.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../kernels.h"
#include "parallel.h"

namespace ddpm_fast {

constexpr int64_t kTile = 1024;  // elements; a multiple of 4, so that a tile begins at a quad of the noise

struct alignas(64) Tile {
  float v[kTile];
};

// A run of elements in contiguous (C, H, W) order: `count` elements of sample `n`, from element `first` on.
struct Run {
  int64_t n, first, count;
};

// The elements of a run as floats: a pointer into the array where it holds them just so, else `scratch`, filled.
const float* load(const Array& array, const Shape& shape, const Run& run, Tile& scratch);
const float* load(const float* array, const Shape& shape, const Run& run, Tile& scratch);

// Where to compute a run: in the array itself where that is possible (then store does nothing), else in `scratch`.
float* begin_store(const Array& array, const Shape& shape, const Run& run, Tile& scratch);
void store(const Array& array, const Shape& shape, const Run& run, const float* values);

// `count` rows of `length` elements, the first from element `at` on, in memory `stride` elements apart. As
// floats they are where they lie or, packed, in `scratch`.
struct Rows {
  int64_t at, count, length, stride;
};
struct FloatRows {
  const float* v;
  int64_t stride;
};
FloatRows load_rows(const Array& array, const Rows& rows, float* scratch);

// Where to compute rows, as begin_store and store do for runs.
struct StoreRows {
  float* v;
  int64_t stride;
};
StoreRows begin_store_rows(const Array& array, const Rows& rows, float* scratch);
void store_rows(const Array& array, const Rows& rows, const StoreRows& values);

// `count` elements as floats; a missing array is `missing` throughout.
std::vector<float> as_floats(const Array& array, int64_t count, float missing);

// The noise of a run: the given array, or drawn into `scratch`; offset noise added.
const float* load_noise(const Noise& noise, const Shape& shape, const Run& run, Tile& scratch);

// count normals of one sample from element `first` (a multiple of 4) on.
void normal_tile(uint64_t seed, uint64_t sample, uint32_t stream, int64_t first, int64_t count, float* z);

// The sum of a run in float64, over lanes that vectorise and do not wait for each other.
double sum_of(const float* a, int64_t count);

// Few elements are done sooner than a second thread wakes up, the more so where another library's idle threads spin.
constexpr int64_t kWorthAThread = 128 * kTile;
inline int useful_threads(int64_t elements, int threads) { return elements < kWorthAThread ? 1 : threads; }

// Calls body(run) for all tiles of all samples, in parallel. Which thread gets which tile does not matter to any op.
template <typename Body>
void for_each_tile(const Shape& shape, int threads, const Body& body) {
  const int64_t elements = shape.elements();
  if (shape.n <= 0 || elements <= 0) return;
  const int64_t tiles = (elements + kTile - 1) / kTile;
  parallel_for(shape.n * tiles, useful_threads(shape.n * elements, threads), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = (i % tiles) * kTile;
      body(Run{i / tiles, first, std::min(kTile, elements - first)});
    }
  });
}

}  // namespace ddpm_fast
