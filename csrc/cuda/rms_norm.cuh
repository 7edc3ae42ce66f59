// What the forward and the backward pass of rms_norm_silu share: who does what, norms, coefficients.
//
// A block has tiles of some places of one sample, one after the other, with all their channels: first the sum of
// squares of each place, and then, read again from the first cache, what is made of it. Contiguous: a tile is kTile
// places wide; its columns are packs of places, and the rows of threads go down the channels. channels_last ("across"):
// for sums a few lanes go along the channels of a place; for the rest columns are packs of channels, and the rows of
// threads go down the places. No atomics: the bits are the same every time.
#pragma once

#include "columns.cuh"

// Of its own: the other norm has a Division and a Share, too.
namespace ddpm_fast::rms_norm {

constexpr uint32_t kTile = 32;           // contiguous: places of a tile
constexpr int64_t kTileElements = 4096;  // channels_last: elements of a tile,
constexpr uint32_t kMaxTile = kThreads;  // and places at most
constexpr int64_t kFewPacks = 16;        // a place of no more is summed by 8 lanes, else by a warp
constexpr uint32_t kRun = 4;             // channels whose squares are added before remainders are kept

// ---- which places a block has ----

struct Division {
  uint32_t parts, part_places, tile;  // part_places is a multiple of tile

  Division(const Shape& shape, int64_t parts, uint32_t tile) : parts(static_cast<uint32_t>(parts)), tile(tile) {
    const int64_t tiles = (shape.inner + tile - 1) / tile;
    part_places = static_cast<uint32_t>((tiles + parts - 1) / parts * tile);
  }
  int64_t threads_of_sample() const { return int64_t{kThreads} * parts; }
};

struct Share {
  int64_t sample;
  uint32_t part, first, end;  // places; first >= end: none

  __device__ Share(const Division& division, const Work& work) {
    const Item item(work, thread_index());  // all threads of a block have one
    sample = item.sample;
    part = item.index / kThreads;
    first = part * division.part_places;
    end = work.inner - first < division.part_places ? work.inner : first + division.part_places;
    if (first >= work.inner) end = first;
  }
};

// The places of one tile of a channels_last sample: where the first one lies.
struct Tile {
  int64_t start;
  uint32_t places;
  __device__ Tile(const Share& share, const Division& division, const Work& work, uint32_t first)
      : start(share.sample * work.elements + static_cast<int64_t>(first) * work.channels),
        places(share.end - first < division.tile ? share.end - first : division.tile) {}
};

// ---- coefficients and norms ----

// weight and beta of N channels from `channel` on
template <int N>
struct Affine {
  Floats<N> weight, beta;
  __device__ Affine(const RmsNormSiluArgs& args, const Work& work, int64_t sample, uint32_t channel) {
    const int64_t row = sample * work.channels;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      weight[j] = 1.0f;
      beta[j] = -0.0f;
    }
    if (args.weight) weight = load_at<AnyFloat, N>(args.weight, (args.weight_per_sample ? row : 0) + channel);
    if (args.beta) beta = load_at<AnyFloat, N>(args.beta, (args.beta_per_sample ? row : 0) + channel);
  }
};

// sqrt(C) / max(|h|, eps), and 1 / C where |h| >= eps, else 0: there the norm counts as constant.
struct Factor {
  float factor, share;
  __device__ Factor(const RmsNormSiluArgs& args, const Work& work, float squares) {
    const float norm = sqrtf(squares), channels = static_cast<float>(work.channels);
    const bool small = norm < args.eps;
    factor = sqrtf(channels) / (small ? args.eps : norm);
    share = small ? 0.0f : 1.0f / channels;
  }
};

// Contiguous: the sums of squares of the N places from `start` on, over the channels of a thread's row.
template <typename T, int N>
__device__ Floats<N> squares_down(const Array& h, const Columns& at, const Work& work, int64_t start) {
  Sum total[N];
  for (uint32_t first = at.row; first < work.channels; first += kRun * at.rows) {
    Floats<N> run{};
#pragma unroll
    for (uint32_t k = 0; k < kRun; ++k) {
      const uint32_t channel = first + k * at.rows;
      if (channel >= work.channels) break;
      const Floats<N> x = load_at<T, N>(h, start + static_cast<int64_t>(channel) * work.inner);
#pragma unroll
      for (int j = 0; j < N; ++j)
        run[j] = run[j] + x[j] * x[j];
    }
#pragma unroll
    for (int j = 0; j < N; ++j)
      total[j].add(run[j]);
  }
  Floats<N> out;
#pragma unroll
  for (int j = 0; j < N; ++j)
    out[j] = total[j].total();
  return out;
}

// channels_last: kLanes threads have a place. Calls keep(place, sum of term(place, pack) over the packs of its
// channels) in one of them.
template <int kLanes, typename Term, typename Keep>
__device__ void sum_each_place(uint32_t places, uint32_t packs, const Term& term, const Keep& keep) {
  const uint32_t lane = threadIdx.x % kLanes;
  for (uint32_t first = 0; first < places; first += kThreads / kLanes) {
    const uint32_t place = first + threadIdx.x / kLanes;
    Sum sum;
    for (uint32_t pack = lane; place < places && pack < packs; pack += kLanes)
      sum.add(term(place, pack));
    const float total = group_sum<kLanes>(sum.total());
    if (lane == 0 && place < places) keep(place, total);
  }
}

// The sum of squares of a pack.
template <typename T, int N>
__device__ float squares_of(const Array& h, int64_t offset) {
  Floats<N> x = load_at<T, N>(h, offset);
#pragma unroll
  for (int j = 0; j < N; ++j)
    x[j] = x[j] * x[j];
  return sum_of(x);
}

// ---- host side ----

// One channel, or one place, is both formats; then the one with the longer packs is taken.
inline bool runs_across(const Shape& shape) { return shape.channels > 1 && (shape.channels_last || shape.inner == 1); }

inline uint32_t tile_of(const Shape& shape) {
  if (!runs_across(shape)) return kTile;
  const int64_t places = kTileElements / shape.channels;
  return static_cast<uint32_t>(places < 1 ? 1 : places < kMaxTile ? places : kMaxTile);
}

// A block for each tile where one launch may have so many.
inline int64_t parts_of(const Shape& shape) {
  const int64_t tiles = (shape.inner + tile_of(shape) - 1) / tile_of(shape);
  return tiles < kMaxThreads / kThreads ? tiles : kMaxThreads / kThreads;
}

// Whether packs of n elements do not straddle a change of place or channel, and h and the coefficients are aligned.
inline bool in_packs(const RmsNormSiluArgs& args, int n) {
  if ((runs_across(args.shape) ? args.shape.channels : args.shape.inner) % n != 0 || !aligned(args.h, n)) return false;
  return !runs_across(args.shape) || (aligned(args.weight, n) && aligned(args.beta, n));
}

}  // namespace ddpm_fast::rms_norm
