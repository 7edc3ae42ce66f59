// group_norm_silu: y = act(GroupNorm(h + bias[c] + temb[n, c])), act = identity or SiLU.
//
// First the mean, then the squares about it, each relative to a value of the group, so that nothing cancels. h is read
// three times, but only once from memory.
#include "group_norm.cuh"

namespace ddpm_fast {
namespace {

using namespace group_norm;

// Of v = h + bias + temb over a group or a part of it: the mean, and the sum of the squares about it.
struct Moments {
  float mean, squares;
};

struct Statistics {
  float mean, rstd;
};

__device__ float* workspace_of(const GroupNormSiluArgs& args, int64_t sample, uint32_t group, uint32_t part) {
  return args.workspace + 2 * ((sample * args.groups + group) * args.parts + part);
}

// One thread writes what was found: as a result, or for merging where it is of a part.
__device__ Statistics keep(
    const GroupNormSiluArgs& args, Phase phase, const Share& share, uint32_t group, const Moments& found, float count,
    bool writes
) {
  const float rstd = 1.0f / sqrtf(found.squares / count + args.eps);
  if (writes && phase == Phase::sums) {
    float* to = workspace_of(args, share.sample, group, share.part);
    to[0] = found.mean;
    to[1] = found.squares;
  } else if (writes) {
    args.mean[share.sample * args.groups + group] = found.mean;
    args.rstd[share.sample * args.groups + group] = rstd;
  }
  return {found.mean, rstd};
}

__device__ Statistics kept(const GroupNormSiluArgs& args, int64_t sample, uint32_t group) {
  return {args.mean[sample * args.groups + group], args.rstd[sample * args.groups + group]};
}

// act(u) of a pack, from h to y
template <typename T, int N>
__device__ void normalize(const GroupNormSiluArgs& args, int64_t offset, const Affines<N>& affine) {
  Floats<N> y = load_at<T, N>(args.h, offset);
#pragma unroll
  for (int j = 0; j < N; ++j)
    y[j] = (y[j] - affine.of[j].offset) * affine.of[j].scale + affine.of[j].beta;
  if (args.silu) {
#pragma unroll
    for (int j = 0; j < N; ++j)
      y[j] = silu(y[j]);
  }
  store_at<T>(args.y, offset, y);
}

// ---- contiguous ----

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 4) group_norm_silu_kernel(
    GroupNormSiluArgs args, Work work, Division division, Phase phase
) {
  __shared__ Affine table[kTable];
  const Share share(division, work, false);
  if (share.places == 0) return;
  const bool tabled = share.channels <= kTable;
  Statistics found;
  if (phase == Phase::apply) {
    found = kept(args, share.sample, share.first_group);
  } else {
    for (uint32_t c = threadIdx.x; tabled && c < share.channels; c += kThreads)
      table[c].offset = added_to(args, work, share.sample, share.first_channel + c);
    __syncthreads();
    // v - first, less what is known of its mean
    const float first = load_at<T, 1>(args.h, share.start)[0] + added_to(args, work, share.sample, share.first_channel);
    const auto differences = [&](uint32_t c, int64_t offset, float shift) {
      const float added = tabled ? table[c].offset : added_to(args, work, share.sample, share.first_channel + c);
      Floats<N> d = load_at<T, N>(args.h, offset);
#pragma unroll
      for (int j = 0; j < N; ++j)
        d[j] = ((d[j] + added) - first) - shift;
      return d;
    };
    const float count = static_cast<float>(share.channels * share.places);
    Sum sum, squares;
    for_each_pack<N>(share, work, division, [&](uint32_t c, int64_t offset) {
      sum.add(sum_of(differences(c, offset, 0.0f)));
    });
    const float shift = block_sum(sum.total()) / count;
    for_each_pack<N>(share, work, division, [&](uint32_t c, int64_t offset) {
      Floats<N> d = differences(c, offset, shift);
#pragma unroll
      for (int j = 0; j < N; ++j)
        d[j] = d[j] * d[j];
      squares.add(sum_of(d));
    });
    const Moments moments{first + shift, block_sum(squares.total())};
    found = keep(args, phase, share, share.first_group, moments, count, threadIdx.x == 0);
  }
  if (phase == Phase::sums) return;
  for (uint32_t c = threadIdx.x; tabled && c < share.channels; c += kThreads)
    table[c] = Affine(args, work, share.sample, share.first_channel + c, found.mean, found.rstd);
  __syncthreads();
  for_each_pack<N>(share, work, division, [&](uint32_t c, int64_t offset) {
    if (tabled) return normalize<T, N>(args, offset, Affines<N>(table[c]));
    const Affine affine(args, work, share.sample, share.first_channel + c, found.mean, found.rstd);
    normalize<T, N>(args, offset, Affines<N>(affine));
  });
}

// ---- channels_last ----

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 4) group_norm_silu_across_kernel(
    GroupNormSiluArgs args, Work work, Division division, Phase phase
) {
  __shared__ float means[kMaxAcross], squares[kMaxAcross];  // of a channel, relative to the first of its group
  __shared__ Statistics statistics[kMaxGroups];
  const Share share(division, work, true);
  if (share.places == 0) return;
  const Columns at(share.channels / N);
  const float count = static_cast<float>(share.places);
  if (phase == Phase::apply) {
    if (threadIdx.x < share.groups) statistics[threadIdx.x] = kept(args, share.sample, share.first_group + threadIdx.x);
  } else {
    at.for_each_pack([&](uint32_t pack, bool mine) {
      Floats<N> first{}, sums{};
      if (mine) {
        first = load_at<T, N>(args.h, share.start + pack * N);
        Sum sum[N];
        at.for_each_place<N>(share, work, pack, [&](int64_t offset) {
          const Floats<N> h = load_at<T, N>(args.h, offset);
#pragma unroll
          for (int j = 0; j < N; ++j)
            sum[j].add(h[j] - first[j]);
        });
#pragma unroll
        for (int j = 0; j < N; ++j)
          sums[j] = sum[j].total();
      }
      sum_rows<N>(at, sums);
      if (mine && at.row == 0) {
#pragma unroll
        for (int j = 0; j < N; ++j)
          means[pack * N + j] = sums[j] / count;
      }
      __syncthreads();
      if (mine) {
        Sum sum[N];
        at.for_each_place<N>(share, work, pack, [&](int64_t offset) {
          const Floats<N> h = load_at<T, N>(args.h, offset);
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const float d = (h[j] - first[j]) - means[pack * N + j];
            sum[j].add(d * d);
          }
        });
#pragma unroll
        for (int j = 0; j < N; ++j)
          sums[j] = sum[j].total();
      }
      sum_rows<N>(at, sums);
      if (mine && at.row == 0) {
#pragma unroll
        for (int j = 0; j < N; ++j)
          squares[pack * N + j] = sums[j];
      }
    });
    __syncthreads();
    // A thread for each group: every channel has equally many places.
    if (threadIdx.x < share.groups) {
      const uint32_t begin = threadIdx.x * division.group_channels;
      const auto first_of = [&](uint32_t c) { return load_at<T, 1>(args.h, share.start + c)[0]; };
      const auto added_of = [&](uint32_t c) { return added_to(args, work, share.sample, share.first_channel + c); };
      const float first = first_of(begin), added = added_of(begin);
      Sum mean, total;
      for (uint32_t c = begin; c < begin + division.group_channels; ++c) {
        means[c] = means[c] + ((first_of(c) - first) + (added_of(c) - added));
        mean.add(means[c]);
      }
      const float shift = mean.total() / static_cast<float>(division.group_channels);
      for (uint32_t c = begin; c < begin + division.group_channels; ++c) {
        const float d = means[c] - shift;
        total.add(squares[c] + count * (d * d));
      }
      const Moments moments{(first + added) + shift, total.total()};
      statistics[threadIdx.x] = keep(
          args, phase, share, share.first_group + threadIdx.x, moments,
          count * static_cast<float>(division.group_channels), true
      );
    }
  }
  if (phase == Phase::sums) return;
  __syncthreads();
  at.for_each_pack([&](uint32_t pack, bool mine) {
    if (!mine) return;
    Affines<N> affine;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Statistics& of_group = statistics[division.by_group_channels.quotient(pack * N + j)];
      const uint32_t channel = share.first_channel + pack * N + j;
      affine.of[j] = Affine(args, work, share.sample, channel, of_group.mean, of_group.rstd);
    }
    at.for_each_place<N>(share, work, pack, [&](int64_t offset) { normalize<T, N>(args, offset, affine); });
  });
}

// ---- parts ----

// A block for each group: the moments of its parts become those of the whole (Chan, Golub & LeVeque 1979).
__global__ void
__launch_bounds__(kThreads, 4) group_norm_silu_merge_kernel(GroupNormSiluArgs args, Work work, Division division) {
  const Item item(work, thread_index());
  const uint32_t group = item.index / kThreads;
  const float first = workspace_of(args, item.sample, group, 0)[0];
  const auto count_of = [&](uint32_t part) {
    return static_cast<float>(division.places(part) * division.group_channels);
  };
  const float count = static_cast<float>(division.inner) * static_cast<float>(division.group_channels);
  Sum sum, squares;
  for (uint32_t part = threadIdx.x; part < division.parts && division.places(part) > 0; part += kThreads)
    sum.add(count_of(part) * (workspace_of(args, item.sample, group, part)[0] - first));
  const float shift = block_sum(sum.total()) / count;
  for (uint32_t part = threadIdx.x; part < division.parts && division.places(part) > 0; part += kThreads) {
    const float* of_part = workspace_of(args, item.sample, group, part);
    const float d = (of_part[0] - first) - shift;
    squares.add(of_part[1] + count_of(part) * (d * d));
  }
  const float total = block_sum(squares.total());
  if (threadIdx.x != 0) return;
  args.mean[item.sample * args.groups + group] = first + shift;
  args.rstd[item.sample * args.groups + group] = 1.0f / sqrtf(total / count + args.eps);
}

template <typename T, int N, bool kAcross>
Status launch_all(const GroupNormSiluArgs& args, int64_t width, int device, void* stream) {
  const Division division(args, width, kAcross ? 1 : N);
  const auto launch_phase = [&](Phase phase) {
    return for_each_launch(device, args.shape, division.threads_of_sample(), [&](const Work& work) {
      if constexpr (kAcross)
        return launch(group_norm_silu_across_kernel<T, N>, work.threads, stream, args, work, division, phase);
      else
        return launch(group_norm_silu_kernel<T, N>, work.threads, stream, args, work, division, phase);
    });
  };
  return launch_phases(args, launch_phase, [&] {
    return for_each_launch(device, args.shape, args.groups * kThreads, [&](const Work& work) {
      return launch(group_norm_silu_merge_kernel, work.threads, stream, args, work, division);
    });
  });
}

template <typename T>
Status launch_packs(const GroupNormSiluArgs& args, int device, void* stream) {
  constexpr int kPack = 16 / sizeof(T);
  const bool aligned_packs = aligned(args.h, kPack) && aligned(args.y, kPack);
  if (!runs_across(args)) {
    if (args.shape.inner % kPack == 0 && aligned_packs) return launch_all<T, kPack, false>(args, 1, device, stream);
    return launch_all<AnyFloat, 1, false>(args, 1, device, stream);
  }
  if (groups_across(args, 4) > 0 && aligned_packs)
    return launch_all<T, 4, true>(args, groups_across(args, 4), device, stream);
  const int64_t width = groups_across(args, 1);
  if (width == 0) return {"on CUDA a group of a channels_last tensor may have at most 1024 channels"};
  return launch_all<AnyFloat, 1, true>(args, width, device, stream);
}

}  // namespace

Status group_norm_silu_cuda(const GroupNormSiluArgs& args, int device, void* stream) {
  if (args.shape.elements() == 0) return {};
  return with_float_type(args.h.dtype, [&](auto h) { return launch_packs<decltype(h)>(args, device, stream); });
}

}  // namespace ddpm_fast
