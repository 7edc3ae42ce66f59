// What the forward and the backward pass of group_norm_silu share: who does what, coefficients, sums of a block.
//
// Contiguous: a block has a group. channels_last: a block has a run of groups side by side, so that what it reads at a
// place is at least kSegment bytes; a thread has the channels of one pack and goes down the places. A group that is too
// large to be read again from the first cache is cut into parts, some places of a block each: one launch then sums, one
// merges the sums of the parts, one applies. Otherwise one launch does all. No atomics: the bits are the same every
// time.
#pragma once

#include "columns.cuh"

// Of its own: the other norm has a Division and a Share, too.
namespace ddpm_fast::group_norm {

enum class Phase { whole, sums, apply };

constexpr int kSegment = 64;      // bytes
constexpr int kMaxAcross = 1024;  // channels_last: channels of a block
constexpr int kMaxGroups = 64;    // channels_last: groups of a block
constexpr uint32_t kTable = 256;  // contiguous: channels whose coefficients a block keeps; others are read again

// ---- which groups, channels and places a block has ----

struct Division {
  uint32_t group_channels, width, groups, parts, part_places, inner;  // width: groups of a block
  FastDiv by_parts, by_group_channels, by_places, by_last_places;

  // Places of a part are a multiple of `unit`.
  Division(const GroupNormSiluArgs& args, int64_t width, int64_t unit)
      : group_channels(static_cast<uint32_t>(args.group_channels())), width(static_cast<uint32_t>(width)),
        groups(static_cast<uint32_t>(args.groups)), parts(static_cast<uint32_t>(args.parts)),
        part_places(static_cast<uint32_t>((args.shape.inner + args.parts * unit - 1) / (args.parts * unit) * unit)),
        inner(static_cast<uint32_t>(args.shape.inner)), by_parts(args.parts), by_group_channels(args.group_channels()),
        by_places(part_places), by_last_places(args.shape.inner % part_places) {}

  int64_t threads_of_sample() const { return int64_t{kThreads} * ((groups + width - 1) / width) * parts; }
  DDPM_FAST_HD uint32_t places(uint32_t part) const {
    const uint64_t first = static_cast<uint64_t>(part) * part_places;
    const uint64_t rest = first < inner ? inner - first : 0;
    return static_cast<uint32_t>(rest < part_places ? rest : part_places);
  }
};

struct Share {
  int64_t sample, start;  // start: offset of the first element
  uint32_t part, first_group, groups, first_channel, channels, first_place, places;

  __device__ Share(const Division& division, const Work& work, bool across) {
    const Item item(work, thread_index());  // all threads of a block have one
    const uint32_t block = item.index / kThreads, run = division.by_parts.quotient(block);
    sample = item.sample;
    part = block - run * division.parts;
    first_group = run * division.width;
    const uint32_t left = division.groups - first_group;
    groups = left < division.width ? left : division.width;
    first_channel = first_group * division.group_channels;
    channels = groups * division.group_channels;
    places = division.places(part);
    first_place = part * division.part_places;
    start = sample * work.elements + (across ? int64_t{first_place} * work.channels + first_channel
                                             : int64_t{first_channel} * work.inner + first_place);
  }
};

// Contiguous: calls body(channel of the group, offset) for the packs of a thread.
template <int N, typename Body>
__device__ void for_each_pack(const Share& share, const Work& work, const Division& division, const Body& body) {
  const FastDiv& by_places = share.places == division.part_places ? division.by_places : division.by_last_places;
  for (uint32_t element = threadIdx.x * N; element < share.channels * share.places; element += kThreads * N) {
    const uint32_t channel = by_places.quotient(element);
    body(channel, share.start + (static_cast<int64_t>(channel) * work.inner + (element - channel * share.places)));
  }
}

// ---- coefficients ----

// bias[c] + temb[n, c]
__device__ inline float added_to(const GroupNormSiluArgs& args, const Work& work, int64_t sample, uint32_t channel) {
  const float bias = args.bias ? number_at(args.bias, channel) : 0.0f;
  return args.temb ? bias + number_at(args.temb, sample * work.channels + channel) : bias;
}

__device__ inline float weight_of(const GroupNormSiluArgs& args, const Work& work, int64_t sample, uint32_t channel) {
  if (!args.weight) return 1.0f;
  return number_at(args.weight, args.weight_per_sample ? sample * work.channels + channel : channel);
}

// u = (h - offset) scale + beta
struct Affine {
  float offset, scale, beta;
  Affine() = default;
  __device__
  Affine(const GroupNormSiluArgs& args, const Work& work, int64_t sample, uint32_t channel, float mean, float rstd)
      : offset(mean - added_to(args, work, sample, channel)), scale(rstd * weight_of(args, work, sample, channel)),
        beta(-0.0f) {
    if (args.beta) beta = number_at(args.beta, args.beta_per_sample ? sample * work.channels + channel : channel);
  }
};

// The coefficients of a pack: of N channels, or N times those of one.
template <int N>
struct Affines {
  Affine of[N];
  __device__ explicit Affines(const Affine& one) {
#pragma unroll
    for (int j = 0; j < N; ++j)
      of[j] = one;
  }
  Affines() = default;
};

// ---- sums ----

// The sum over the block, in every thread.
__device__ inline float block_sum(float value) {
  __shared__ float total;
  value = group_sum<kThreads>(value);
  if (threadIdx.x == 0) total = value;
  __syncthreads();
  value = total;
  __syncthreads();
  return value;
}

// ---- host side ----

// One channel, or one place, is both formats; then the one with the longer packs is taken, if it takes the group.
inline bool runs_across(const GroupNormSiluArgs& args) {
  const Shape& shape = args.shape;
  if (shape.inner == 1) return shape.channels > 1 && args.group_channels() <= kMaxAcross;
  return shape.channels > 1 && shape.channels_last;
}

// channels_last: groups of a block, such that they are whole packs of n channels and a segment; 0: there are none such.
inline int64_t groups_across(const GroupNormSiluArgs& args, int n) {
  const int64_t channels = args.group_channels();
  if (args.shape.channels % n != 0) return 0;
  int64_t width = 1;
  while (width < args.groups && (width * channels % n != 0 || width * channels * size_of(args.h.dtype) < kSegment))
    ++width;
  return width * channels <= kMaxAcross && width <= kMaxGroups ? width : 0;
}

// launch_phase(phase) once, or for the sums and for the rest with merge() between; all return a Status.
template <typename LaunchPhase, typename Merge>
Status launch_phases(const GroupNormSiluArgs& args, const LaunchPhase& launch_phase, const Merge& merge) {
  if (args.parts <= 1) return launch_phase(Phase::whole);
  Status status = launch_phase(Phase::sums);
  if (status.ok()) status = merge();
  return status.ok() ? launch_phase(Phase::apply) : status;
}

}  // namespace ddpm_fast::group_norm
