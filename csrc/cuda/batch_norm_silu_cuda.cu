// batch_norm_silu: y = act((h - mean) rstd weight + bias) + temb[n, c], with the statistics of the batch or given ones.
//
// The sums of a part are those of h less a value near the part's mean, so that nothing cancels. h is read twice.
#include "batch_norm.cuh"

namespace ddpm_fast {
namespace {

using namespace batch_norm;

// The numbers of a part: a value near its mean, how much that is short of it, and the squares about the mean. From the
// sums of d = h - shift and of d^2: of P places with a shift made of K of them, the squares of d are at most 1 + P / K
// times those about the mean.
__device__ void keep_moments(float* to, float shift, float sum, float squares, uint32_t places) {
  const float off = sum / static_cast<float>(places), about = squares - off * sum;
  keep(to, shift, off, about < 0.0f ? 0.0f : about);  // NaN stays NaN
}

__device__ float first_places(uint32_t places, uint32_t most) {
  return static_cast<float>(places < most ? places : most);
}

// act(u) + temb of a pack, from h to y; affine_of(j), temb_of(j): of its j-th element.
template <typename T, int N, typename AffineOf, typename TembOf>
__device__ void
normalize(const BatchNormSiluArgs& args, int64_t offset, const AffineOf& affine_of, const TembOf& temb_of) {
  Floats<N> y = load_at<T, N>(args.h, offset);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const Affine affine = affine_of(j);
    y[j] = (y[j] - affine.offset) * affine.scale + affine.beta;
  }
  if (args.silu) {
#pragma unroll
    for (int j = 0; j < N; ++j)
      y[j] = silu(y[j]);
  }
  if (args.temb) {
#pragma unroll
    for (int j = 0; j < N; ++j)
      y[j] = y[j] + temb_of(j);
  }
  store_at<T>(args.y, offset, y);
}

// ---- contiguous ----

template <int kLanes, typename T, int N>
__global__ void
__launch_bounds__(kThreads, 4) batch_norm_silu_sums_kernel(BatchNormSiluArgs args, Work work, Division division) {
  const Lane at(division, work, kLanes);
  Floats<N> d{};
  if (at.lane * N < at.places) d = load_at<T, N>(args.h, at.start + at.lane * N);
  const float first = __shfl_sync(0xFFFFFFFFu, group_sum<kLanes>(sum_of(d)), 0, kLanes);
  const float shift = first / first_places(at.places, kLanes * N);
  Sum sum, squares;
  at.for_each_pack<N>(kLanes, [&](int64_t offset) {
    d = load_at<T, N>(args.h, offset);
#pragma unroll
    for (int j = 0; j < N; ++j)
      d[j] = d[j] - shift;
    sum.add(sum_of(d));
#pragma unroll
    for (int j = 0; j < N; ++j)
      d[j] = d[j] * d[j];
    squares.add(sum_of(d));
  });
  const float of_d = group_sum<kLanes>(sum.total()), of_squares = group_sum<kLanes>(squares.total());
  if (at.lane == 0 && at.places > 0)
    keep_moments(numbers_of(args, work, at.sample, at.part, at.channel), shift, of_d, of_squares, at.places);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 4) batch_norm_silu_kernel(
    BatchNormSiluArgs args, Work work, Division division, uint32_t lanes
) {
  const Lane at(division, work, lanes);
  if (at.places == 0) return;
  const Affine affine(args, at.channel);
  const float temb = args.temb ? number_at(args.temb, at.sample * work.channels + at.channel) : 0.0f;
  at.for_each_pack<N>(lanes, [&](int64_t offset) {
    normalize<T, N>(args, offset, [&](int) { return affine; }, [&](int) { return temb; });
  });
}

// ---- channels_last ----

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 4) batch_norm_silu_sums_across_kernel(
    BatchNormSiluArgs args, Work work, Division division
) {
  __shared__ float shifts[kRun];
  const Share share(division, work);
  if (share.places == 0) return;
  const Columns at(share.channels / N);
  const bool mine = at.row < at.rows;
  Floats<N> sums{}, squares{}, shift{};
  if (mine && at.row < share.places)
    sums = load_at<T, N>(args.h, share.start + (static_cast<int64_t>(at.row) * work.channels + at.column * N));
  sum_rows<N>(at, sums);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (at.row == 0) shifts[at.column * N + j] = sums[j] / first_places(share.places, at.rows);
    sums[j] = 0.0f;
  }
  __syncthreads();
  if (mine) {
#pragma unroll
    for (int j = 0; j < N; ++j)
      shift[j] = shifts[at.column * N + j];
    at.for_each_place<N>(share, work, at.column, [&](int64_t offset) {
      const Floats<N> h = load_at<T, N>(args.h, offset);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float d = h[j] - shift[j];
        sums[j] = sums[j] + d;
        squares[j] = squares[j] + d * d;
      }
    });
  }
  sum_rows<N>(at, sums);
  sum_rows<N>(at, squares);
  if (at.row != 0) return;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    float* to = numbers_of(args, work, share.sample, share.part, share.first_channel + at.column * N + j);
    keep_moments(to, shift[j], sums[j], squares[j], share.places);
  }
}

template <typename T, int N>
__global__ void
__launch_bounds__(kThreads, 4) batch_norm_silu_across_kernel(BatchNormSiluArgs args, Work work, Division division) {
  __shared__ Table table;
  alignas(16) __shared__ float tembs[kRun];
  const Share share(division, work);
  if (share.places == 0) return;
  if (args.temb && threadIdx.x < share.channels)
    tembs[threadIdx.x] = number_at(args.temb, share.sample * work.channels + share.first_channel + threadIdx.x);
  table.fill(args, share);
  const Columns at(share.channels / N);
  if (at.row >= at.rows) return;
  Affine affine[N];
  Floats<N> temb{};
#pragma unroll
  for (int j = 0; j < N; ++j) {
    affine[j] = table.at(at.column * N + j);
    if (args.temb) temb[j] = tembs[at.column * N + j];
  }
  at.for_each_place<N>(share, work, at.column, [&](int64_t offset) {
    normalize<T, N>(args, whole_pack<N>(offset), [&](int j) { return affine[j]; }, [&](int j) { return temb[j]; });
  });
}

// ---- all parts ----

// The moments of the parts become those of the batch (Chan, Golub & LeVeque 1979).
__global__ void
__launch_bounds__(kThreads, 4) batch_norm_silu_merge_kernel(BatchNormSiluArgs args, Work work, Division division) {
  const Column column(args, work, division);
  const float middle = column.mine ? args.workspace[kNumbers * column.channel] : 0.0f;
  Sum sum, squares;
  column.for_each_part(args, division, [&](float places, const float* of_part) {
    sum.add(places * ((of_part[0] - middle) + of_part[1]));
  });
  Floats<1> total{sum.total()};
  column.add_up(total);
  const float count = count_of(args), off = total[0] / count;
  column.for_each_part(args, division, [&](float places, const float* of_part) {
    const float d = ((of_part[0] - middle) + of_part[1]) - off;
    squares.add(of_part[2] + places * (d * d));
  });
  total[0] = squares.total();
  column.add_up(total);
  if (!column.mine || column.at.row != 0) return;
  args.mean[column.channel] = middle + off;
  args.var[column.channel] = total[0] / count;
}

template <typename T, int N, bool kAcross>
Status launch_all(const BatchNormSiluArgs& args, int device, void* stream) {
  const Division division(args, N);
  Status status;
  if (args.of_batch) {
    status = for_each_sample(args, division, N, device, [&](const Work& work, uint32_t lanes) {
      const auto start = [&](auto kernel) { return launch(kernel, work.threads, stream, args, work, division); };
      if constexpr (kAcross)
        return start(batch_norm_silu_sums_across_kernel<T, N>);
      else
        return lanes == kFew ? start(batch_norm_silu_sums_kernel<kFew, T, N>)
                             : start(batch_norm_silu_sums_kernel<32, T, N>);
    });
    if (!status.ok()) return status;
    status = for_each_channel(args, device, [&](const Work& work) {
      return launch(batch_norm_silu_merge_kernel, work.threads, stream, args, work, division);
    });
  }
  if (!status.ok()) return status;
  return for_each_sample(args, division, N, device, [&](const Work& work, uint32_t lanes) {
    if constexpr (kAcross)
      return launch(batch_norm_silu_across_kernel<T, N>, work.threads, stream, args, work, division);
    else
      return launch(batch_norm_silu_kernel<T, N>, work.threads, stream, args, work, division, lanes);
  });
}

template <typename T>
Status launch_packs(const BatchNormSiluArgs& args, int device, void* stream) {
  constexpr int kPack = 16 / sizeof(T);
  const bool across = runs_across(args.shape);
  if (!in_packs(args.shape, kPack) || !aligned(args.h, kPack) || !aligned(args.y, kPack))
    return across ? launch_all<AnyFloat, 1, true>(args, device, stream)
                  : launch_all<AnyFloat, 1, false>(args, device, stream);
  return across ? launch_all<T, kPack, true>(args, device, stream) : launch_all<T, kPack, false>(args, device, stream);
}

}  // namespace

Status batch_norm_silu_cuda(const BatchNormSiluArgs& args, int device, void* stream) {
  if (args.shape.n * args.shape.elements() == 0) return {};
  return with_float_type(args.h.dtype, [&](auto h) { return launch_packs<decltype(h)>(args, device, stream); });
}

}  // namespace ddpm_fast
