// batch_norm_silu backward. With d = h - mean, xhat = rstd d and g_u = g act'(u):
//
//   g_temb[n, c] = sum of g over a sample        d_bias[c] = sum of g_u        d_weight[c] = sum of g_u xhat
//   g_h = weight rstd (g_u - mean(g_u) - xhat mean(g_u xhat)) = g_u scale - (base + d slope)
//
// The means are over the channel, and left out where the statistics are not the batch's. g and h are read twice.
#include "batch_norm.cuh"

namespace ddpm_fast {
namespace {

using namespace batch_norm;

// What pulls g_u back to h, of a channel: behind the numbers of all parts, written when these are added up.
struct Pull {
  float base, slope;
};
__device__ Pull* pull_of(const BatchNormSiluArgs& args, uint32_t channel) {
  const int64_t numbers = kNumbers * args.shape.n * args.parts * args.shape.channels;
  return reinterpret_cast<Pull*>(args.workspace + numbers) + channel;
}

// g, g_u and d of a pack; affine_of(j): of its j-th element.
template <typename T, int N>
struct Gradients {
  Floats<N> g, g_u, d;
  template <typename AffineOf>
  __device__ Gradients(const BatchNormSiluArgs& args, int64_t offset, const AffineOf& affine_of)
      : g(load_at<T, N>(args.g, offset)), g_u(g), d(load_at<T, N>(args.h, offset)) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Affine affine = affine_of(j);
      d[j] = d[j] - affine.offset;
      if (args.silu) g_u[j] = g_u[j] * silu_grad(d[j] * affine.scale + affine.beta);
    }
  }
};

// g_h of a pack; affine_of(j), pull_of(j): of its j-th element.
template <typename T, int N, typename AffineOf, typename PullOf>
__device__ void
pull_back(const BatchNormSiluArgs& args, int64_t offset, const AffineOf& affine_of, const PullOf& pull_of) {
  Gradients<T, N> grads(args, offset, affine_of);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const Pull pull = pull_of(j);
    grads.g_u[j] = grads.g_u[j] * affine_of(j).scale - (pull.base + grads.d[j] * pull.slope);
  }
  store_at<T>(args.g_h, offset, grads.g_u);
}

// ---- contiguous ----

template <int kLanes, typename T, int N>
__global__ void __launch_bounds__(kThreads, 4) batch_norm_silu_backward_sums_kernel(
    BatchNormSiluArgs args, Work work, Division division
) {
  const Lane at(division, work, kLanes);
  Affine affine;
  if (at.places > 0) affine = Affine(args, at.channel);
  Sum g, g_u, gd;
  at.for_each_pack<N>(kLanes, [&](int64_t offset) {
    Gradients<T, N> grads(args, offset, [&](int) { return affine; });
    g.add(sum_of(grads.g));
    g_u.add(sum_of(grads.g_u));
#pragma unroll
    for (int j = 0; j < N; ++j)
      grads.d[j] = grads.g_u[j] * grads.d[j];
    gd.add(sum_of(grads.d));
  });
  const float of_g = group_sum<kLanes>(g.total());
  const float of_gu = group_sum<kLanes>(g_u.total());
  const float of_gd = group_sum<kLanes>(gd.total());
  if (at.lane == 0 && at.places > 0) keep(numbers_of(args, work, at.sample, at.part, at.channel), of_gu, of_gd, of_g);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 4) batch_norm_silu_backward_kernel(
    BatchNormSiluArgs args, Work work, Division division, uint32_t lanes
) {
  const Lane at(division, work, lanes);
  if (at.places == 0) return;
  const Affine affine(args, at.channel);
  const Pull pull = *pull_of(args, at.channel);
  at.for_each_pack<N>(lanes, [&](int64_t offset) {
    pull_back<T, N>(args, offset, [&](int) { return affine; }, [&](int) { return pull; });
  });
}

// ---- channels_last ----

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 4) batch_norm_silu_backward_sums_across_kernel(
    BatchNormSiluArgs args, Work work, Division division
) {
  __shared__ Table table;
  const Share share(division, work);
  if (share.places == 0) return;
  table.fill(args, share);
  const Columns at(share.channels / N);
  const uint32_t first = at.column * N;
  Floats<N> of_g{}, of_gu{}, of_gd{};
  if (at.row < at.rows) {
    at.for_each_place<N>(share, work, at.column, [&](int64_t offset) {
      const Gradients<T, N> grads(args, offset, [&](int j) { return table.at(first + j); });
#pragma unroll
      for (int j = 0; j < N; ++j) {
        of_g[j] = of_g[j] + grads.g[j];
        of_gu[j] = of_gu[j] + grads.g_u[j];
        of_gd[j] = of_gd[j] + grads.g_u[j] * grads.d[j];
      }
    });
  }
  sum_rows<N>(at, of_g);
  sum_rows<N>(at, of_gu);
  sum_rows<N>(at, of_gd);
  if (at.row != 0) return;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    float* to = numbers_of(args, work, share.sample, share.part, share.first_channel + first + j);
    keep(to, of_gu[j], of_gd[j], of_g[j]);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 4) batch_norm_silu_backward_across_kernel(
    BatchNormSiluArgs args, Work work, Division division
) {
  __shared__ Table table;
  alignas(16) __shared__ float bases[kRun], slopes[kRun];
  const Share share(division, work);
  if (share.places == 0) return;
  if (threadIdx.x < share.channels) {
    const Pull pull = *pull_of(args, share.first_channel + threadIdx.x);
    bases[threadIdx.x] = pull.base;
    slopes[threadIdx.x] = pull.slope;
  }
  table.fill(args, share);
  const Columns at(share.channels / N);
  if (at.row >= at.rows) return;
  Affine affine[N];
  Pull pull[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    affine[j] = table.at(at.column * N + j);
    pull[j] = {bases[at.column * N + j], slopes[at.column * N + j]};
  }
  at.for_each_place<N>(share, work, at.column, [&](int64_t offset) {
    pull_back<T, N>(args, whole_pack<N>(offset), [&](int j) { return affine[j]; }, [&](int j) { return pull[j]; });
  });
}

// ---- all parts ----

__global__ void __launch_bounds__(kThreads, 4) batch_norm_silu_backward_merge_kernel(
    BatchNormSiluArgs args, Work work, Division division
) {
  const Column column(args, work, division);
  Sum g_u, gd;
  column.for_each_part(args, division, [&](float, const float* of_part) {
    g_u.add(of_part[0]);
    gd.add(of_part[1]);
  });
  Floats<2> sums{g_u.total(), gd.total()};
  column.add_up(sums);
  if (!column.mine) return;
  const uint32_t channel = column.channel, channels = static_cast<uint32_t>(args.shape.channels);
  if (column.at.row == 0) {
    const float rstd = rstd_of(args, channel), scale = rstd * weight_of(args, channel), count = count_of(args);
    const float of_gx = rstd * sums[1];
    args.d_bias[channel] = sums[0];
    args.d_weight[channel] = of_gx;
    *pull_of(args, channel) =
        args.of_batch ? Pull{scale * (sums[0] / count), scale * (rstd * (of_gx / count))} : Pull{};
  }
  if (args.g_temb == nullptr) return;
  for (int64_t sample = column.at.row; sample < args.shape.n; sample += column.at.rows) {
    Sum g;
    for (uint32_t part = 0; part < division.parts && division.places(part) > 0; ++part)
      g.add(args.workspace[kNumbers * ((sample * args.parts + part) * channels + channel) + 2]);
    args.g_temb[sample * channels + channel] = g.total();
  }
}

template <typename T, int N, bool kAcross>
Status launch_all(const BatchNormSiluArgs& args, int device, void* stream) {
  const Division division(args, N);
  Status status = for_each_sample(args, division, N, device, [&](const Work& work, uint32_t lanes) {
    const auto start = [&](auto kernel) { return launch(kernel, work.threads, stream, args, work, division); };
    if constexpr (kAcross)
      return start(batch_norm_silu_backward_sums_across_kernel<T, N>);
    else
      return lanes == kFew ? start(batch_norm_silu_backward_sums_kernel<kFew, T, N>)
                           : start(batch_norm_silu_backward_sums_kernel<32, T, N>);
  });
  if (!status.ok()) return status;
  status = for_each_channel(args, device, [&](const Work& work) {
    return launch(batch_norm_silu_backward_merge_kernel, work.threads, stream, args, work, division);
  });
  if (!status.ok() || !args.g_h) return status;
  return for_each_sample(args, division, N, device, [&](const Work& work, uint32_t lanes) {
    if constexpr (kAcross)
      return launch(batch_norm_silu_backward_across_kernel<T, N>, work.threads, stream, args, work, division);
    else
      return launch(batch_norm_silu_backward_kernel<T, N>, work.threads, stream, args, work, division, lanes);
  });
}

// channels_last: packs of four, for the sums and values of more are more than the registers of a thread.
template <typename T>
Status launch_packs(const BatchNormSiluArgs& args, int device, void* stream) {
  constexpr int kPack = 16 / sizeof(T);
  const auto fit = [&](int n) {
    return args.g.dtype == args.h.dtype && in_packs(args.shape, n) && aligned(args.g, n) && aligned(args.h, n) &&
           aligned(args.g_h, n);
  };
  if (runs_across(args.shape))
    return fit(4) ? launch_all<T, 4, true>(args, device, stream) : launch_all<AnyFloat, 1, true>(args, device, stream);
  return fit(kPack) ? launch_all<T, kPack, false>(args, device, stream)
                    : launch_all<AnyFloat, 1, false>(args, device, stream);
}

}  // namespace

Status batch_norm_silu_backward_cuda(const BatchNormSiluArgs& args, int device, void* stream) {
  if (args.shape.n * args.shape.elements() == 0) return {};
  return with_float_type(args.h.dtype, [&](auto h) { return launch_packs<decltype(h)>(args, device, stream); });
}

}  // namespace ddpm_fast
