// group_norm_silu backward. With d = h - offset, xhat = rstd d, g_u = g act'(u) and g_x = g_u weight:
//
//   d_beta[n, c] = sum of g_u        d_weight[n, c] = sum of g_u xhat
//   g_h = rstd (g_x - mean(g_x) - xhat mean(g_x xhat)) = g_u scale - (base + d slope)
//
// The means over the group are made of the sums of its channels, and so is g_sum[n, c], the sum of g_h. g and h are
// read twice, but only once from memory.
#include "group_norm.cuh"

namespace ddpm_fast {
namespace {

using namespace group_norm;

// Of a channel: the sums of g_u, g_u d and d.
struct ChannelSums {
  float g, gd, d;
};

// Of a group: what pulls g_u back to h.
struct Means {
  float base, slope;
};

__device__ float* workspace_of(const GroupNormSiluArgs& args, int64_t row, uint32_t part) {
  return args.workspace + 3 * (row * args.parts + part);
}
// Behind the sums of all parts; written by the merging, read by the apply phase.
__device__ float* means_of(const GroupNormSiluArgs& args, int64_t sample, uint32_t group) {
  return workspace_of(args, args.shape.n * args.shape.channels, 0) + 2 * (sample * args.groups + group);
}

__device__ float mean_of(const GroupNormSiluArgs& args, int64_t sample, uint32_t group) {
  return args.mean[sample * args.groups + group];
}
__device__ float rstd_of(const GroupNormSiluArgs& args, int64_t sample, uint32_t group) {
  return args.rstd[sample * args.groups + group];
}

// The sums of a channel as results (those of d in place of g_sum, which needs the means), or of a part for merging.
__device__ void
keep(const GroupNormSiluArgs& args, Phase phase, int64_t row, uint32_t part, const ChannelSums& sums, float rstd) {
  if (phase == Phase::sums) {
    float* to = workspace_of(args, row, part);
    to[0] = sums.g;
    to[1] = sums.gd;
    to[2] = sums.d;
    return;
  }
  args.d_beta[row] = sums.g;
  args.d_weight[row] = rstd * sums.gd;
  if (args.g_sum != nullptr) args.g_sum[row] = sums.d;
}

__device__ Means means_from(const Division& division, float rstd, float of_g, float of_gx) {
  const float count = static_cast<float>(division.inner) * static_cast<float>(division.group_channels);
  return {rstd * (of_g / count), rstd * rstd * (of_gx / count)};
}

// g_sum from the sums that are in its place, by the thread that kept them.
__device__ void
finish_sum(const GroupNormSiluArgs& args, const Division& division, int64_t row, float scale, const Means& means) {
  if (args.g_sum == nullptr) return;
  const float inner = static_cast<float>(division.inner);
  args.g_sum[row] = scale * args.d_beta[row] - (inner * means.base + means.slope * args.g_sum[row]);
}

// g_u and d of a pack
template <typename T, int N>
struct Gradients {
  Floats<N> g_u, d;
  __device__ Gradients(const GroupNormSiluArgs& args, int64_t offset, const Affines<N>& affine) {
    g_u = load_at<T, N>(args.g, offset);
    d = load_at<T, N>(args.h, offset);
#pragma unroll
    for (int j = 0; j < N; ++j)
      d[j] = d[j] - affine.of[j].offset;
    if (!args.silu) return;
#pragma unroll
    for (int j = 0; j < N; ++j)
      g_u[j] = g_u[j] * silu_grad(d[j] * affine.of[j].scale + affine.of[j].beta);
  }
};

// ---- contiguous: kGroup threads go along the places of a channel ----

template <int kGroup, typename T, int N>
__global__ void __launch_bounds__(kThreads, 4) group_norm_silu_backward_kernel(
    GroupNormSiluArgs args, Work work, Division division, Phase phase
) {
  constexpr uint32_t kLanes = kThreads / kGroup;
  __shared__ Affine table[kTable];
  const Share share(division, work, false);
  if (share.places == 0) return;
  const uint32_t lane = threadIdx.x / kGroup, thread = threadIdx.x % kGroup;
  const float mean = mean_of(args, share.sample, share.first_group),
              rstd = rstd_of(args, share.sample, share.first_group);
  const int64_t first_row = share.sample * work.channels + share.first_channel;
  const auto affine_of = [&](uint32_t c) {
    return Affine(args, work, share.sample, share.first_channel + c, mean, rstd);
  };
  Means means;
  if (phase == Phase::apply) {
    const float* merged = means_of(args, share.sample, share.first_group);
    means = {merged[0], merged[1]};
  } else {
    Sum of_g, of_gx;
    for (uint32_t first = 0; first < share.channels; first += kLanes) {
      const uint32_t c = first + lane;
      Sum g, gd, d;
      if (c < share.channels) {
        const Affines<N> affine(affine_of(c));
        const int64_t start = share.start + static_cast<int64_t>(c) * work.inner;
        for (uint32_t place = thread * N; place < share.places; place += kGroup * N) {
          Gradients<T, N> grads(args, start + place, affine);
          g.add(sum_of(grads.g_u));
          d.add(sum_of(grads.d));
#pragma unroll
          for (int j = 0; j < N; ++j)
            grads.d[j] = grads.g_u[j] * grads.d[j];
          gd.add(sum_of(grads.d));
        }
      }
      ChannelSums sums;
      sums.g = group_sum<kGroup>(g.total());
      sums.gd = group_sum<kGroup>(gd.total());
      sums.d = group_sum<kGroup>(d.total());
      if (thread != 0 || c >= share.channels) continue;
      keep(args, phase, first_row + c, share.part, sums, rstd);
      const float weight = weight_of(args, work, share.sample, share.first_channel + c);
      of_g.add(weight * sums.g);
      of_gx.add(weight * (rstd * sums.gd));
    }
    if (phase == Phase::sums) return;
    means = means_from(division, rstd, block_sum(of_g.total()), block_sum(of_gx.total()));
    for (uint32_t c = lane; thread == 0 && c < share.channels; c += kLanes) {
      const float weight = weight_of(args, work, share.sample, share.first_channel + c);
      finish_sum(args, division, first_row + c, rstd * weight, means);
    }
  }
  if (!args.g_h) return;
  const bool tabled = share.channels <= kTable;
  for (uint32_t c = threadIdx.x; tabled && c < share.channels; c += kThreads)
    table[c] = affine_of(c);
  __syncthreads();
  for_each_pack<N>(share, work, division, [&](uint32_t c, int64_t offset) {
    const Affines<N> affine(tabled ? table[c] : affine_of(c));
    const Gradients<T, N> grads(args, offset, affine);
    Floats<N> g_h;
#pragma unroll
    for (int j = 0; j < N; ++j)
      g_h[j] = grads.g_u[j] * affine.of[j].scale - (means.base + grads.d[j] * means.slope);
    store_at<T>(args.g_h, offset, g_h);
  });
}

// ---- channels_last ----

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 4) group_norm_silu_backward_across_kernel(
    GroupNormSiluArgs args, Work work, Division division, Phase phase
) {
  __shared__ ChannelSums sums[kMaxAcross];
  __shared__ Means means[kMaxGroups];
  const Share share(division, work, true);
  if (share.places == 0) return;
  const Columns at(share.channels / N);
  const int64_t first_row = share.sample * work.channels + share.first_channel;
  const auto group_of = [&](uint32_t c) { return share.first_group + division.by_group_channels.quotient(c); };
  const auto affines_of = [&](uint32_t pack) {
    Affines<N> affine;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const uint32_t c = pack * N + j, group = group_of(c);
      const float mean = mean_of(args, share.sample, group), rstd = rstd_of(args, share.sample, group);
      affine.of[j] = Affine(args, work, share.sample, share.first_channel + c, mean, rstd);
    }
    return affine;
  };
  if (phase == Phase::apply) {
    if (threadIdx.x < share.groups) {
      const float* merged = means_of(args, share.sample, share.first_group + threadIdx.x);
      means[threadIdx.x] = {merged[0], merged[1]};
    }
  } else {
    at.for_each_pack([&](uint32_t pack, bool mine) {
      Floats<N> totals[3] = {};
      if (mine) {
        const Affines<N> affine = affines_of(pack);
        Sum g[N], gd[N], d[N];
        at.for_each_place<N>(share, work, pack, [&](int64_t offset) {
          const Gradients<T, N> grads(args, offset, affine);
#pragma unroll
          for (int j = 0; j < N; ++j) {
            g[j].add(grads.g_u[j]);
            gd[j].add(grads.g_u[j] * grads.d[j]);
            d[j].add(grads.d[j]);
          }
        });
#pragma unroll
        for (int j = 0; j < N; ++j) {
          totals[0][j] = g[j].total();
          totals[1][j] = gd[j].total();
          totals[2][j] = d[j].total();
        }
      }
#pragma unroll
      for (int k = 0; k < 3; ++k)
        sum_rows<N>(at, totals[k]);
      if (!mine || at.row != 0) return;
#pragma unroll
      for (int j = 0; j < N; ++j)
        sums[pack * N + j] = {totals[0][j], totals[1][j], totals[2][j]};
    });
    __syncthreads();
    for (uint32_t c = threadIdx.x; c < share.channels; c += kThreads)
      keep(args, phase, first_row + c, share.part, sums[c], rstd_of(args, share.sample, group_of(c)));
    if (phase == Phase::sums) return;
    // A thread for each group.
    if (threadIdx.x < share.groups) {
      const float rstd = rstd_of(args, share.sample, share.first_group + threadIdx.x);
      const uint32_t begin = threadIdx.x * division.group_channels;
      Sum of_g, of_gx;
      for (uint32_t c = begin; c < begin + division.group_channels; ++c) {
        const float weight = weight_of(args, work, share.sample, share.first_channel + c);
        of_g.add(weight * sums[c].g);
        of_gx.add(weight * (rstd * sums[c].gd));
      }
      means[threadIdx.x] = means_from(division, rstd, of_g.total(), of_gx.total());
    }
    __syncthreads();
    for (uint32_t c = threadIdx.x; c < share.channels; c += kThreads) {
      const float weight = weight_of(args, work, share.sample, share.first_channel + c);
      const float scale = rstd_of(args, share.sample, group_of(c)) * weight;
      finish_sum(args, division, first_row + c, scale, means[group_of(c) - share.first_group]);
    }
  }
  if (!args.g_h) return;
  __syncthreads();
  at.for_each_pack([&](uint32_t pack, bool mine) {
    if (!mine) return;
    const Affines<N> affine = affines_of(pack);
    Means of_channel[N];
#pragma unroll
    for (int j = 0; j < N; ++j)
      of_channel[j] = means[group_of(pack * N + j) - share.first_group];
    at.for_each_place<N>(share, work, pack, [&](int64_t offset) {
      const Gradients<T, N> grads(args, offset, affine);
      Floats<N> g_h;
#pragma unroll
      for (int j = 0; j < N; ++j)
        g_h[j] = grads.g_u[j] * affine.of[j].scale - (of_channel[j].base + grads.d[j] * of_channel[j].slope);
      store_at<T>(args.g_h, offset, g_h);
    });
  });
}

// ---- parts ----

// A block for each group, a warp for each of its channels in turn.
__global__ void __launch_bounds__(kThreads, 4) group_norm_silu_backward_merge_kernel(
    GroupNormSiluArgs args, Work work, Division division
) {
  constexpr uint32_t kWarps = kThreads / 32;
  const Item item(work, thread_index());
  const uint32_t group = item.index / kThreads, warp = threadIdx.x / 32, thread = threadIdx.x % 32;
  const uint32_t first_channel = group * division.group_channels;
  const float rstd = rstd_of(args, item.sample, group);
  Sum of_g, of_gx;
  for (uint32_t c = warp; c < division.group_channels; c += kWarps) {
    const int64_t row = item.sample * work.channels + first_channel + c;
    Sum g, gd, d;
    for (uint32_t part = thread; part < division.parts && division.places(part) > 0; part += 32) {
      const float* of_part = workspace_of(args, row, part);
      g.add(of_part[0]);
      gd.add(of_part[1]);
      d.add(of_part[2]);
    }
    ChannelSums sums;
    sums.g = group_sum<32>(g.total());
    sums.gd = group_sum<32>(gd.total());
    sums.d = group_sum<32>(d.total());
    if (thread != 0) continue;
    keep(args, Phase::whole, row, 0, sums, rstd);
    const float weight = weight_of(args, work, item.sample, first_channel + c);
    of_g.add(weight * sums.g);
    of_gx.add(weight * (rstd * sums.gd));
  }
  const Means means = means_from(division, rstd, block_sum(of_g.total()), block_sum(of_gx.total()));
  for (uint32_t c = warp; thread == 0 && c < division.group_channels; c += kWarps) {
    const float weight = weight_of(args, work, item.sample, first_channel + c);
    finish_sum(args, division, item.sample * work.channels + first_channel + c, rstd * weight, means);
  }
  if (threadIdx.x != 0) return;
  float* merged = means_of(args, item.sample, group);
  merged[0] = means.base;
  merged[1] = means.slope;
}

template <typename T, int N, bool kAcross>
Status launch_all(const GroupNormSiluArgs& args, int64_t width, int device, void* stream) {
  const Division division(args, width, kAcross ? 1 : N);
  // A warp for each channel where there are enough of them, or where their places would not occupy a block.
  const bool warps = division.group_channels >= kThreads / 32 || division.part_places <= 64 * N;
  const auto launch_phase = [&](Phase phase) {
    return for_each_launch(device, args.shape, division.threads_of_sample(), [&](const Work& work) {
      const auto start = [&](auto kernel) { return launch(kernel, work.threads, stream, args, work, division, phase); };
      if constexpr (kAcross)
        return start(group_norm_silu_backward_across_kernel<T, N>);
      else if (warps)
        return start(group_norm_silu_backward_kernel<32, T, N>);
      else
        return start(group_norm_silu_backward_kernel<kThreads, T, N>);
    });
  };
  return launch_phases(args, launch_phase, [&] {
    return for_each_launch(device, args.shape, args.groups * kThreads, [&](const Work& work) {
      return launch(group_norm_silu_backward_merge_kernel, work.threads, stream, args, work, division);
    });
  });
}

template <typename T>
Status launch_packs(const GroupNormSiluArgs& args, int device, void* stream) {
  constexpr int kPack = 16 / sizeof(T);
  const bool aligned_packs = aligned(args.g, kPack) && aligned(args.h, kPack) && aligned(args.g_h, kPack);
  const bool one_type = args.g.dtype == args.h.dtype;
  if (!runs_across(args)) {
    if (args.shape.inner % kPack == 0 && aligned_packs && one_type)
      return launch_all<T, kPack, false>(args, 1, device, stream);
    return launch_all<AnyFloat, 1, false>(args, 1, device, stream);
  }
  // Packs of two: the sums, coefficients and values of four channels are more than the registers of a thread.
  if (groups_across(args, 2) > 0 && aligned_packs && one_type)
    return launch_all<T, 2, true>(args, groups_across(args, 2), device, stream);
  const int64_t width = groups_across(args, 1);
  if (width == 0) return {"on CUDA a group of a channels_last tensor may have at most 1024 channels"};
  return launch_all<AnyFloat, 1, true>(args, width, device, stream);
}

}  // namespace

Status group_norm_silu_backward_cuda(const GroupNormSiluArgs& args, int device, void* stream) {
  if (args.shape.elements() == 0) return {};
  return with_float_type(args.h.dtype, [&](auto h) { return launch_packs<decltype(h)>(args, device, stream); });
}

}  // namespace ddpm_fast
