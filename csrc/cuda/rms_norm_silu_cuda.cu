// rms_norm_silu: y = act(h sqrt(C) / max(|h|, eps) weight + beta) + residual, |h| over the channels of a place.
#include "rms_norm.cuh"

namespace ddpm_fast {
namespace {

using namespace rms_norm;

// act(h factor weight + beta) + residual of a pack, to y; factor_of(j), weight_of(j), beta_of(j): of its j-th element.
template <typename T, int N, typename FactorOf, typename WeightOf, typename BetaOf>
__device__ void normalize(
    const RmsNormSiluArgs& args, int64_t offset, const FactorOf& factor_of, const WeightOf& weight_of,
    const BetaOf& beta_of
) {
  Floats<N> y = load_at<T, N>(args.h, offset);
#pragma unroll
  for (int j = 0; j < N; ++j)
    y[j] = (y[j] * factor_of(j)) * weight_of(j) + beta_of(j);
  if (args.silu) {
#pragma unroll
    for (int j = 0; j < N; ++j)
      y[j] = silu(y[j]);
  }
  if (args.residual) {
    const Floats<N> residual = load_at<T, N>(args.residual, offset);
#pragma unroll
    for (int j = 0; j < N; ++j)
      y[j] = y[j] + residual[j];
  }
  store_at<T>(args.y, offset, y);
}

// ---- contiguous ----

template <typename T, int N>
__global__ void
__launch_bounds__(kThreads, 4) rms_norm_silu_kernel(RmsNormSiluArgs args, Work work, Division division) {
  __shared__ float factors[kTile];
  const Share share(division, work);
  const Columns at(kTile / N);
  for (uint32_t first = share.first; first < share.end; first += kTile) {
    const uint32_t place = first + at.column * N;
    const bool mine = place < share.end;
    const int64_t start = share.sample * work.elements + place;
    Floats<N> squares{};
    if (mine) squares = squares_down<T, N>(args.h, at, work, start);
    sum_rows<N>(at, squares);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (mine && at.row == 0) factors[at.column * N + j] = Factor(args, work, squares[j]).factor;
    }
    __syncthreads();
    Floats<N> factor;
#pragma unroll
    for (int j = 0; j < N; ++j)
      factor[j] = factors[at.column * N + j];  // written again after the barriers of sum_rows
    for (uint32_t channel = at.row; mine && channel < work.channels; channel += at.rows) {
      const Affine<1> affine(args, work, share.sample, channel);
      normalize<T, N>(
          args, start + static_cast<int64_t>(channel) * work.inner, [&](int j) { return factor[j]; },
          [&](int) { return affine.weight[0]; }, [&](int) { return affine.beta[0]; }
      );
    }
  }
}

// ---- channels_last ----

template <int kLanes, typename T, int N>
__global__ void
__launch_bounds__(kThreads, 4) rms_norm_silu_across_kernel(RmsNormSiluArgs args, Work work, Division division) {
  __shared__ float factors[kMaxTile];
  const Share share(division, work);
  const Columns at(work.channels / N);
  for (uint32_t first = share.first; first < share.end; first += division.tile) {
    const Tile tile(share, division, work, first);
    sum_each_place<kLanes>(
        tile.places, at.packs,
        [&](uint32_t place, uint32_t pack) {
          return squares_of<T, N>(args.h, tile.start + (static_cast<int64_t>(place) * work.channels + pack * N));
        },
        [&](uint32_t place, float squares) { factors[place] = Factor(args, work, squares).factor; }
    );
    __syncthreads();
    at.for_each_pack([&](uint32_t pack, bool mine) {
      if (!mine) return;
      const Affine<N> affine(args, work, share.sample, pack * N);
      for (uint32_t place = at.row; place < tile.places; place += at.rows) {
        const float factor = factors[place];
        normalize<T, N>(
            args, tile.start + (static_cast<int64_t>(place) * work.channels + pack * N), [&](int) { return factor; },
            [&](int j) { return affine.weight[j]; }, [&](int j) { return affine.beta[j]; }
        );
      }
    });
    __syncthreads();  // factors is written again
  }
}

template <typename T, int N>
Status launch_all(const RmsNormSiluArgs& args, int device, void* stream) {
  const Division division(args.shape, parts_of(args.shape), tile_of(args.shape));
  return for_each_launch(device, args.shape, division.threads_of_sample(), [&](const Work& work) {
    const auto start = [&](auto kernel) { return launch(kernel, work.threads, stream, args, work, division); };
    if (!runs_across(args.shape)) return start(rms_norm_silu_kernel<T, N>);
    return args.shape.channels <= kFewPacks * N ? start(rms_norm_silu_across_kernel<8, T, N>)
                                                : start(rms_norm_silu_across_kernel<32, T, N>);
  });
}

template <typename T>
Status launch_packs(const RmsNormSiluArgs& args, int device, void* stream) {
  constexpr int kPack = 16 / sizeof(T);
  if (in_packs(args, kPack) && aligned(args.y, kPack) && aligned(args.residual, kPack))
    return launch_all<T, kPack>(args, device, stream);
  return launch_all<AnyFloat, 1>(args, device, stream);
}

}  // namespace

Status rms_norm_silu_cuda(const RmsNormSiluArgs& args, int device, void* stream) {
  if (args.shape.elements() == 0) return {};
  return with_float_type(args.h.dtype, [&](auto h) { return launch_packs<decltype(h)>(args, device, stream); });
}

}  // namespace ddpm_fast
