// What the forward and the backward pass of batch_norm_silu share: who does what, coefficients, sums of the batch.
//
// The batch is cut into samples, and these into parts of some places each. A first launch sums over the places of each
// part, a second one adds the parts up channel by channel, a third one has all that an element needs. Contiguous: some
// lanes of a warp have a channel of a part. channels_last ("across"): a block has a run of channels of a part, a thread
// one pack of them, and goes down the places. No atomics: the bits are the same every time.
#pragma once

#include "columns.cuh"

// Of its own: the other norms have a Division and a Share, too.
namespace ddpm_fast::batch_norm {

constexpr uint32_t kRun = kThreads;    // channels_last: channels of a block at most, so that each pack has a thread
constexpr uint32_t kMergeColumns = 4;  // channels of a block that adds up, side by side: a sector of memory
constexpr int kNumbers = 3;            // that are kept of a channel of a part
constexpr uint32_t kFew = 4;           // lanes of a channel, where its packs are few; else a warp
constexpr uint32_t kFewPacks = 4 * kFew;

// ---- which channels and places a thread has ----

struct Division {
  uint32_t parts, part_places, inner;
  FastDiv by_parts;

  // Places of a part are a multiple of `unit`.
  Division(const BatchNormSiluArgs& args, int64_t unit)
      : parts(static_cast<uint32_t>(args.parts)),
        part_places(static_cast<uint32_t>((args.shape.inner + args.parts * unit - 1) / (args.parts * unit) * unit)),
        inner(static_cast<uint32_t>(args.shape.inner)), by_parts(args.parts) {}

  DDPM_FAST_HD uint32_t places(uint32_t part) const {
    const uint64_t first = static_cast<uint64_t>(part) * part_places;
    const uint64_t rest = first < inner ? inner - first : 0;
    return static_cast<uint32_t>(rest < part_places ? rest : part_places);
  }
};

// Contiguous: `lanes` neighbouring threads have a channel of a part. One that does not exist has no places.
struct Lane {
  int64_t sample, start;  // start: offset of the first place
  uint32_t part, channel, lane, places;

  __device__ Lane(const Division& division, const Work& work, uint32_t lanes) : lane(threadIdx.x % lanes) {
    const Item item(work, thread_index());
    const uint32_t unit = item.index / lanes;
    sample = item.sample;
    part = work.by_channels.quotient(unit);
    channel = unit - part * work.channels;
    places = part < division.parts ? division.places(part) : 0;
    start = sample * work.elements + static_cast<int64_t>(channel) * work.inner + int64_t{part} * division.part_places;
  }
  // Calls body(offset) for the packs of the thread.
  template <int N, typename Body>
  __device__ void for_each_pack(uint32_t lanes, const Body& body) const {
    for (uint32_t place = lane * N; place < places; place += lanes * N)
      body(start + place);
  }
};

// channels_last: the run of channels of a block.
struct Share {
  int64_t sample, start;  // start: offset of the first element
  uint32_t part, first_channel, channels, places;

  __device__ Share(const Division& division, const Work& work) {
    const Item item(work, thread_index());  // all threads of a block have one
    const uint32_t block = item.index / kThreads, run = division.by_parts.quotient(block);
    sample = item.sample;
    part = block - run * division.parts;
    first_channel = run * kRun;
    channels = work.channels - first_channel < kRun ? work.channels - first_channel : kRun;
    places = division.places(part);
    start = sample * work.elements + int64_t{part} * division.part_places * work.channels + first_channel;
  }
};

// Of a pack of N: the same offset. Said once more, because nvcc here stores a pack element by element without.
template <int N>
__device__ int64_t whole_pack(int64_t offset) {
  return offset & ~int64_t{N - 1};
}

// ---- coefficients ----

__device__ inline float rstd_of(const BatchNormSiluArgs& args, uint32_t channel) {
  return 1.0f / sqrtf(args.var[channel] + args.eps);
}

__device__ inline float weight_of(const BatchNormSiluArgs& args, uint32_t channel) {
  return args.weight ? number_at(args.weight, channel) : 1.0f;
}

// u = (h - offset) scale + beta
struct Affine {
  float offset, scale, beta;
  Affine() = default;
  __device__ Affine(const BatchNormSiluArgs& args, uint32_t channel)
      : offset(args.mean[channel]), scale(rstd_of(args, channel) * weight_of(args, channel)),
        beta(args.bias ? number_at(args.bias, channel) : -0.0f) {}
};

// Those of the channels of a block, side by side: neighbouring threads read neighbouring packs.
struct Table {
  alignas(16) float offset[kRun], scale[kRun], beta[kRun];
  // One thread for each channel; the block then waits.
  __device__ void fill(const BatchNormSiluArgs& args, const Share& share) {
    if (threadIdx.x < share.channels) {
      const Affine affine(args, share.first_channel + threadIdx.x);
      offset[threadIdx.x] = affine.offset;
      scale[threadIdx.x] = affine.scale;
      beta[threadIdx.x] = affine.beta;
    }
    __syncthreads();
  }
  __device__ Affine at(uint32_t channel) const {
    Affine affine;
    affine.offset = offset[channel];
    affine.scale = scale[channel];
    affine.beta = beta[channel];
    return affine;
  }
};

// ---- sums ----

// What is kept of a channel of a part.
__device__ inline float*
numbers_of(const BatchNormSiluArgs& args, const Work& work, int64_t sample, uint32_t part, uint32_t channel) {
  return args.workspace + kNumbers * ((sample * args.parts + part) * work.channels + channel);
}

__device__ inline void keep(float* to, float a, float b, float c) {
  to[0] = a;
  to[1] = b;
  to[2] = c;
}

// One channel of a block that adds up. A thread has every rows-th part of the batch.
struct Column {
  Columns at;
  uint32_t channel, all;
  bool mine;
  __device__ Column(const BatchNormSiluArgs& args, const Work& work, const Division& division)
      : at(kMergeColumns), all(static_cast<uint32_t>(args.shape.n) * division.parts) {
    const Item item(work, thread_index());  // a "sample" is a block here
    channel = static_cast<uint32_t>(item.sample) * kMergeColumns + at.column;
    mine = channel < args.shape.channels;
  }
  // Calls body(number of places, numbers) for the thread's parts that have places.
  template <typename Body>
  __device__ void for_each_part(const BatchNormSiluArgs& args, const Division& division, const Body& body) const {
    for (uint32_t k = at.row; mine && k < all; k += at.rows) {
      const uint32_t places = division.places(k - division.by_parts.quotient(k) * division.parts);
      if (places > 0) body(static_cast<float>(places), args.workspace + kNumbers * (k * args.shape.channels + channel));
    }
  }
  // The sums over the threads of the channel, in all of them.
  template <int N>
  __device__ void add_up(Floats<N>& sums) const {
    __shared__ float totals[N][kMergeColumns];
    sum_rows<N>(at, sums);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (at.row == 0) totals[j][at.column] = sums[j];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < N; ++j)
      sums[j] = totals[j][at.column];
    __syncthreads();  // totals may be written again by the next call
  }
};

__device__ inline float count_of(const BatchNormSiluArgs& args) {
  return static_cast<float>(args.shape.n) * static_cast<float>(args.shape.inner);
}

// ---- host side ----

// One channel, or one place, is both formats; then the one with the longer packs is taken.
inline bool runs_across(const Shape& shape) { return shape.channels > 1 && (shape.channels_last || shape.inner == 1); }

inline uint32_t lanes_of(const Division& division, int n) {
  return division.part_places <= kFewPacks * static_cast<uint32_t>(n) ? kFew : 32;
}

// launch_one(Work, lanes of a channel) for all samples; channels_last: 0 lanes.
template <typename LaunchOne>
Status for_each_sample(
    const BatchNormSiluArgs& args, const Division& division, int n, int device, const LaunchOne& launch_one
) {
  const Shape& shape = args.shape;
  const bool across = runs_across(shape);
  const uint32_t lanes = across ? 0 : lanes_of(division, n);
  const int64_t blocks = across ? (shape.channels + kRun - 1) / kRun * args.parts
                                : (shape.channels * args.parts * lanes + kThreads - 1) / kThreads;
  return for_each_launch(device, shape, blocks * kThreads, [&](const Work& work) { return launch_one(work, lanes); });
}

// launch_one(Work) for the channels; more than 2^31 parts of a batch cannot be counted.
template <typename LaunchOne>
Status for_each_channel(const BatchNormSiluArgs& args, int device, const LaunchOne& launch_one) {
  if (args.shape.n * args.parts > kMaxElements) return {"on CUDA a batch may have at most 2147483644 samples"};
  const Shape blocks{(args.shape.channels + kMergeColumns - 1) / kMergeColumns, 1, 1, false};
  return for_each_launch(device, blocks, kThreads, launch_one);
}

// Whether packs of n elements do not straddle a change of place or channel.
inline bool in_packs(const Shape& shape, int n) { return (runs_across(shape) ? shape.channels : shape.inner) % n == 0; }

}  // namespace ddpm_fast::batch_norm
