// rms_norm_silu backward. With xhat = h factor, u = xhat weight + beta, g_u = g act'(u) and g_x = g_u weight:
//
//   d_weight[n, c] = sum of g_u xhat        d_beta[n, c] = sum of g_u
//   g_h = factor (g_x - xhat mean(g_x xhat)), the mean over the channels of the place; absent where |h| < eps
//
// g and h are read three times, but only once from memory.
#include "rms_norm.cuh"

namespace ddpm_fast {
namespace {

using namespace rms_norm;

// g_u and xhat of a pack; factor_of(j), weight_of(j), beta_of(j): of its j-th element.
template <typename T, int N>
struct Gradients {
  Floats<N> g_u, xhat;
  template <typename FactorOf, typename WeightOf, typename BetaOf>
  __device__ Gradients(
      const RmsNormSiluArgs& args, int64_t offset, const FactorOf& factor_of, const WeightOf& weight_of,
      const BetaOf& beta_of
  ) {
    g_u = load_at<T, N>(args.g, offset);
    xhat = load_at<T, N>(args.h, offset);
#pragma unroll
    for (int j = 0; j < N; ++j)
      xhat[j] = xhat[j] * factor_of(j);
    if (!args.silu) return;
#pragma unroll
    for (int j = 0; j < N; ++j)
      g_u[j] = g_u[j] * silu_grad(xhat[j] * weight_of(j) + beta_of(j));
  }
};

// Adds the sums of a tile to those of the block's earlier tiles. One thread does so for a channel, always the same.
__device__ void keep(
    const RmsNormSiluArgs& args, const Work& work, const Share& share, uint32_t channel, bool first, float of_gx,
    float of_g
) {
  const int64_t row = share.sample * work.channels + channel;
  float *d_weight = args.d_weight + row, *d_beta = args.d_beta + row;
  if (args.parts > 1) {
    d_weight = args.workspace + 2 * ((share.sample * args.parts + share.part) * work.channels + channel);
    d_beta = d_weight + 1;
  }
  *d_weight = first ? of_gx : *d_weight + of_gx;
  *d_beta = first ? of_g : *d_beta + of_g;
}

// ---- contiguous ----

template <typename T, int N>
__global__ void
__launch_bounds__(kThreads, 4) rms_norm_silu_backward_kernel(RmsNormSiluArgs args, Work work, Division division) {
  constexpr int kColumns = kTile / N;
  __shared__ float factors[kTile], slopes[kTile];  // slope: the mean of g_x xhat, or 0
  const Share share(division, work);
  const Columns at(kColumns);
  for (uint32_t first = share.first; first < share.end; first += kTile) {
    const uint32_t place = first + at.column * N;
    const bool mine = place < share.end;
    const int64_t start = share.sample * work.elements + place;
    Floats<N> sums{}, factor{}, slope{};
    if (mine) sums = squares_down<T, N>(args.h, at, work, start);
    sum_rows<N>(at, sums);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (!mine || at.row != 0) continue;
      const Factor found(args, work, sums[j]);
      factors[at.column * N + j] = found.factor;
      slopes[at.column * N + j] = found.share;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < N; ++j)
      factor[j] = mine ? factors[at.column * N + j] : 0.0f;
    const auto gradients = [&](const Affine<1>& affine, int64_t offset) {
      return Gradients<T, N>(
          args, offset, [&](int j) { return factor[j]; }, [&](int) { return affine.weight[0]; },
          [&](int) { return affine.beta[0]; }
      );
    };
    if (args.g_h) {
      Sum dot[N];
      for (uint32_t channel = at.row; mine && channel < work.channels; channel += at.rows) {
        const Affine<1> affine(args, work, share.sample, channel);
        const auto grads = gradients(affine, start + static_cast<int64_t>(channel) * work.inner);
#pragma unroll
        for (int j = 0; j < N; ++j)
          dot[j].add((grads.g_u[j] * affine.weight[0]) * grads.xhat[j]);
      }
#pragma unroll
      for (int j = 0; j < N; ++j)
        sums[j] = dot[j].total();
      sum_rows<N>(at, sums);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (mine && at.row == 0) slopes[at.column * N + j] = sums[j] * slopes[at.column * N + j];
      }
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < N; ++j)
      slope[j] = mine ? slopes[at.column * N + j] : 0.0f;  // written again after the barriers of sum_rows
    for (uint32_t run = 0; run < work.channels; run += at.rows) {
      const uint32_t channel = run + at.row;
      float d_weight = 0.0f, d_beta = 0.0f;
      if (mine && channel < work.channels) {
        const int64_t offset = start + static_cast<int64_t>(channel) * work.inner;
        const Affine<1> affine(args, work, share.sample, channel);
        auto grads = gradients(affine, offset);
        Floats<N> g_h;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          g_h[j] = factor[j] * (grads.g_u[j] * affine.weight[0] - grads.xhat[j] * slope[j]);
          grads.xhat[j] = grads.g_u[j] * grads.xhat[j];
        }
        if (args.g_h) store_at<T>(args.g_h, offset, g_h);
        d_weight = sum_of(grads.xhat);
        d_beta = sum_of(grads.g_u);
      }
      if (args.d_weight == nullptr) continue;
      d_weight = group_sum<kColumns>(d_weight);
      d_beta = group_sum<kColumns>(d_beta);
      if (at.column == 0 && channel < work.channels)
        keep(args, work, share, channel, first == share.first, d_weight, d_beta);
    }
  }
}

// ---- channels_last ----

template <int kLanes, typename T, int N>
__global__ void __launch_bounds__(kThreads, 4) rms_norm_silu_backward_across_kernel(
    RmsNormSiluArgs args, Work work, Division division
) {
  __shared__ float factors[kMaxTile], slopes[kMaxTile];
  const Share share(division, work);
  const Columns at(work.channels / N);
  for (uint32_t first = share.first; first < share.end; first += division.tile) {
    const Tile tile(share, division, work, first);
    const auto offset_of = [&](uint32_t place, uint32_t pack) {
      return tile.start + (static_cast<int64_t>(place) * work.channels + pack * N);
    };
    const auto gradients = [&](const Affine<N>& affine, uint32_t place, uint32_t pack) {
      const float factor = factors[place];
      return Gradients<T, N>(
          args, offset_of(place, pack), [&](int) { return factor; }, [&](int j) { return affine.weight[j]; },
          [&](int j) { return affine.beta[j]; }
      );
    };
    sum_each_place<kLanes>(
        tile.places, at.packs,
        [&](uint32_t place, uint32_t pack) { return squares_of<T, N>(args.h, offset_of(place, pack)); },
        [&](uint32_t place, float squares) {
          const Factor found(args, work, squares);
          factors[place] = found.factor;
          slopes[place] = found.share;
        }
    );
    __syncthreads();
    if (args.g_h) {
      sum_each_place<kLanes>(
          tile.places, at.packs,
          [&](uint32_t place, uint32_t pack) {
            const Affine<N> affine(args, work, share.sample, pack * N);
            auto grads = gradients(affine, place, pack);
#pragma unroll
            for (int j = 0; j < N; ++j)
              grads.xhat[j] = (grads.g_u[j] * affine.weight[j]) * grads.xhat[j];
            return sum_of(grads.xhat);
          },
          [&](uint32_t place, float dot) { slopes[place] = dot * slopes[place]; }
      );
      __syncthreads();
    }
    at.for_each_pack([&](uint32_t pack, bool mine) {
      Floats<N> of_gx{}, of_g{};
      if (mine) {
        const Affine<N> affine(args, work, share.sample, pack * N);
        for (uint32_t place = at.row; place < tile.places; place += at.rows) {
          const auto grads = gradients(affine, place, pack);
          const float factor = factors[place], slope = slopes[place];
          Floats<N> g_h;
#pragma unroll
          for (int j = 0; j < N; ++j) {
            of_gx[j] = of_gx[j] + grads.g_u[j] * grads.xhat[j];
            of_g[j] = of_g[j] + grads.g_u[j];
            g_h[j] = factor * (grads.g_u[j] * affine.weight[j] - grads.xhat[j] * slope);
          }
          if (args.g_h) store_at<T>(args.g_h, offset_of(place, pack), g_h);
        }
      }
      if (args.d_weight == nullptr) return;
      sum_rows<N>(at, of_gx);
      sum_rows<N>(at, of_g);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (mine && at.row == 0) keep(args, work, share, pack * N + j, first == share.first, of_gx[j], of_g[j]);
      }
    });
    __syncthreads();  // factors and slopes are written again
  }
}

// ---- parts ----

constexpr uint32_t kMergeColumns = 32;  // channels of a block, side by side

// The sums of a channel over all parts that have places.
__global__ void
__launch_bounds__(kThreads, 4) rms_norm_silu_backward_merge_kernel(RmsNormSiluArgs args, Work work, Division division) {
  const Item item(work, thread_index());
  const Columns at(kMergeColumns);
  const uint32_t channel = item.index / kThreads * kMergeColumns + at.column;
  const bool mine = channel < work.channels;
  Sum of_gx, of_g;
  for (uint32_t part = at.row; mine && part < division.parts; part += at.rows) {
    if (static_cast<uint64_t>(part) * division.part_places >= work.inner) break;
    const float* found = args.workspace + 2 * ((item.sample * args.parts + part) * work.channels + channel);
    of_gx.add(found[0]);
    of_g.add(found[1]);
  }
  Floats<2> sums{of_gx.total(), of_g.total()};
  sum_rows<2>(at, sums);
  if (!mine || at.row != 0) return;
  args.d_weight[item.sample * work.channels + channel] = sums[0];
  args.d_beta[item.sample * work.channels + channel] = sums[1];
}

template <typename T, int N>
Status launch_all(const RmsNormSiluArgs& args, int device, void* stream) {
  // Without sums to write, as many blocks as in the forward pass.
  const int64_t parts = args.d_weight == nullptr ? parts_of(args.shape) : args.parts;
  const Division division(args.shape, parts, tile_of(args.shape));
  const Status status = for_each_launch(device, args.shape, division.threads_of_sample(), [&](const Work& work) {
    const auto start = [&](auto kernel) { return launch(kernel, work.threads, stream, args, work, division); };
    if (!runs_across(args.shape)) return start(rms_norm_silu_backward_kernel<T, N>);
    return args.shape.channels <= kFewPacks * N ? start(rms_norm_silu_backward_across_kernel<8, T, N>)
                                                : start(rms_norm_silu_backward_across_kernel<32, T, N>);
  });
  if (!status.ok() || args.d_weight == nullptr || args.parts <= 1) return status;
  const int64_t blocks = (args.shape.channels + kMergeColumns - 1) / kMergeColumns;
  return for_each_launch(device, args.shape, blocks * kThreads, [&](const Work& work) {
    return launch(rms_norm_silu_backward_merge_kernel, work.threads, stream, args, work, division);
  });
}

// Packs of four: the sums and coefficients of more, and the values themselves, are more than the registers of a thread.
template <typename T>
Status launch_packs(const RmsNormSiluArgs& args, int device, void* stream) {
  if (args.g.dtype == args.h.dtype && in_packs(args, 4) && aligned(args.g) && aligned(args.g_h))
    return launch_all<T, 4>(args, device, stream);
  return launch_all<AnyFloat, 1>(args, device, stream);
}

}  // namespace

Status rms_norm_silu_backward_cuda(const RmsNormSiluArgs& args, int device, void* stream) {
  if (args.shape.elements() == 0) return {};
  return with_float_type(args.h.dtype, [&](auto h) { return launch_packs<decltype(h)>(args, device, stream); });
}

}  // namespace ddpm_fast
