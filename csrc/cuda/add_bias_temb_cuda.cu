// add_bias_temb: y = act(h + bias[c]) + temb[n, c], act = identity or SiLU, and its gradients:
//
//   g_h = g act'(h + bias[c])        g_sum[n, c] = sum of g        gh_sum[n, c] = sum of g_h
//
// There is no noise here, so threads go through memory in its own order, in packs of 16 bytes. A pack of a contiguous
// tensor is inside one channel; a pack of a channels_last one ("across") is at neighbouring channels of one place.
#include "reduce.cuh"

namespace ddpm_fast {
namespace {

// bias or temb for a pack: the numbers of N channels from `offset` on, or N times the one there.
template <int N, bool kAcross>
__device__ Floats<N> per_channel(const Array& array, int64_t offset) {
  if constexpr (kAcross) return load_at<AnyFloat, N>(array, offset);
  const float value = load_at<AnyFloat, 1>(array, offset)[0];
  Floats<N> out;
#pragma unroll
  for (int j = 0; j < N; ++j)
    out[j] = value;
  return out;
}

template <typename T, int N, bool kAcross>
__global__ void __launch_bounds__(kThreads) add_bias_temb_kernel(AddBiasTembArgs args, Work work) {
  const uint32_t thread = thread_index();
  if (thread >= work.threads) return;
  const Item item(work, thread);
  const uint32_t element = item.index * N;
  const uint32_t row = (kAcross ? work.by_channels : work.by_inner).quotient(element);
  const uint32_t channel = kAcross ? element - row * work.channels : row;
  const int64_t offset = item.sample * work.elements + element;
  Floats<N> y = load_at<T, N>(args.h, offset);
  if (args.bias) {
    const Floats<N> bias = per_channel<N, kAcross>(args.bias, channel);
#pragma unroll
    for (int j = 0; j < N; ++j)
      y[j] = y[j] + bias[j];
  }
  if (args.silu) {
#pragma unroll
    for (int j = 0; j < N; ++j)
      y[j] = silu(y[j]);
  }
  if (args.temb) {
    const Floats<N> temb = per_channel<N, kAcross>(args.temb, item.sample * work.channels + channel);
#pragma unroll
    for (int j = 0; j < N; ++j)
      y[j] = y[j] + temb[j];
  }
  store_at<T>(args.y, offset, y);
}

// One pack of the backward pass: g, and g_h (stored where it is wanted).
template <typename T, int N>
struct Gradients {
  Floats<N> g, g_h;
  __device__ Gradients(const AddBiasTembBackwardArgs& args, int64_t offset, const Floats<N>& bias) {
    g = load_at<T, N>(args.g, offset);
    g_h = g;
    if (!args.g_h && args.gh_sum == nullptr) return;
    if (args.silu) {
      const Floats<N> h = load_at<T, N>(args.h, offset);
#pragma unroll
      for (int j = 0; j < N; ++j)
        g_h[j] = g[j] * silu_grad(args.bias ? h[j] + bias[j] : h[j]);
    }
    if (args.g_h) store_at<T>(args.g_h, offset, g_h);
  }
};

// Contiguous: a group of threads goes along the inner elements of one (n, c).
template <int kGroup, typename T, int N>
__global__ void __launch_bounds__(kThreads) add_bias_temb_backward_kernel(AddBiasTembBackwardArgs args, Work work) {
  const uint32_t thread = thread_index();
  const Item item(work, thread);
  const uint32_t channel = item.index / kGroup;
  const int64_t row = item.sample * work.channels + channel;
  Sum g_sum, gh_sum;
  if (thread < work.threads) {
    const Floats<N> bias = args.bias ? per_channel<N, false>(args.bias, channel) : Floats<N>{};
    for (uint32_t place = item.index % kGroup * N; place < work.inner; place += kGroup * N) {
      const Gradients<T, N> grads(args, row * work.inner + place, bias);
      g_sum.add(sum_of(grads.g));
      gh_sum.add(sum_of(grads.g_h));
    }
  }
  const float g_total = group_sum<kGroup>(g_sum.total());
  const float gh_total = group_sum<kGroup>(gh_sum.total());
  if (thread >= work.threads || item.index % kGroup != 0) return;
  if (args.g_sum != nullptr) args.g_sum[row] = g_total;
  if (args.gh_sum != nullptr) args.gh_sum[row] = gh_total;
}

// channels_last: a block has kColumns packs of neighbouring channels and goes down the places, kRows at a time.
constexpr int kColumns = 8, kRows = kThreads / kColumns;

template <typename T, int N>
__global__ void
__launch_bounds__(kThreads) add_bias_temb_backward_across_kernel(AddBiasTembBackwardArgs args, Work work) {
  __shared__ float of_warp[2][kThreads / 32][kColumns * N];
  const Item item(work, thread_index());  // work.threads is a multiple of kThreads: every thread has an item
  const uint32_t column = threadIdx.x % kColumns;
  const uint32_t first_channel = item.index / kThreads * (kColumns * N);
  const uint32_t channel = first_channel + column * N;
  Sum g_sum[N], gh_sum[N];
  if (channel < work.channels) {
    const Floats<N> bias = args.bias ? per_channel<N, true>(args.bias, channel) : Floats<N>{};
    for (uint32_t place = threadIdx.x / kColumns; place < work.inner; place += kRows) {
      const int64_t offset = item.sample * work.elements + (place * work.channels + channel);
      const Gradients<T, N> grads(args, offset, bias);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        g_sum[j].add(grads.g[j]);
        gh_sum[j].add(grads.g_h[j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    float totals[2] = {g_sum[j].total(), gh_sum[j].total()};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int step = 16; step >= kColumns; step /= 2)
        totals[k] = totals[k] + __shfl_down_sync(0xFFFFFFFFu, totals[k], step);
      if (threadIdx.x % 32 < kColumns) of_warp[k][threadIdx.x / 32][column * N + j] = totals[k];
    }
  }
  __syncthreads();
  const uint32_t k = threadIdx.x / (kColumns * N), c = threadIdx.x % (kColumns * N);
  float* out = k == 0 ? args.g_sum : args.gh_sum;
  if (k >= 2 || out == nullptr || first_channel + c >= work.channels) return;
  Sum sum;
  for (int warp = 0; warp < kThreads / 32; ++warp)
    sum.add(of_warp[k][warp][c]);
  out[item.sample * work.channels + first_channel + c] = sum.total();
}

// One channel, or one place, is both formats; then the one with the longer packs is taken.
bool is_across(const Shape& shape) { return shape.channels > 1 && (shape.channels_last || shape.inner == 1); }

// Whether packs of n elements are aligned and do not straddle a change of channel or place.
bool in_packs(const Shape& shape, int n) { return (is_across(shape) ? shape.channels : shape.inner) % n == 0; }

template <typename T, int N>
Status launch_forward(const AddBiasTembArgs& args, const Work& work, void* stream) {
  return is_across(args.shape) ? launch(add_bias_temb_kernel<T, N, true>, work.threads, stream, args, work)
                               : launch(add_bias_temb_kernel<T, N, false>, work.threads, stream, args, work);
}

template <int kGroup, typename T, int N>
Status launch_rows(const AddBiasTembBackwardArgs& args, int device, void* stream) {
  return for_each_launch(device, args.shape, args.shape.channels * kGroup, [&](const Work& work) {
    return launch(add_bias_temb_backward_kernel<kGroup, T, N>, work.threads, stream, args, work);
  });
}

template <typename T, int N>
Status launch_backward(const AddBiasTembBackwardArgs& args, int device, void* stream) {
  if (is_across(args.shape)) {
    const int64_t blocks = (args.shape.channels + kColumns * N - 1) / (kColumns * N);
    return for_each_launch(device, args.shape, blocks * kThreads, [&](const Work& work) {
      return launch(add_bias_temb_backward_across_kernel<T, N>, work.threads, stream, args, work);
    });
  }
  const int64_t packs = args.shape.inner / N;  // a thread should have a few, and a warp should not idle
  if (packs <= 16) return launch_rows<4, T, N>(args, device, stream);
  if (packs <= 512) return launch_rows<32, T, N>(args, device, stream);
  return launch_rows<kThreads, T, N>(args, device, stream);
}

}  // namespace

Status add_bias_temb_cuda(const AddBiasTembArgs& args, int device, void* stream) {
  const int pack = 16 / size_of(args.h.dtype);
  const bool packs = args.h.dtype == args.y.dtype && in_packs(args.shape, pack) && aligned(args.h, pack) &&
                     aligned(args.y, pack) && aligned(args.bias, pack) && aligned(args.temb, pack);
  return for_each_launch(device, args.shape, args.shape.elements() / (packs ? pack : 1), [&](const Work& work) {
    if (!packs) return launch_forward<AnyFloat, 1>(args, work, stream);
    return with_float_type(args.h.dtype, [&](auto h) {
      return launch_forward<decltype(h), 16 / sizeof(h)>(args, work, stream);
    });
  });
}

Status add_bias_temb_backward_cuda(const AddBiasTembBackwardArgs& args, int device, void* stream) {
  const DType dtype = args.g.dtype;
  const bool packs = in_packs(args.shape, 4) && aligned(args.g) && aligned(args.h) && aligned(args.bias) &&
                     aligned(args.g_h) && (!args.h || args.h.dtype == dtype) && (!args.g_h || args.g_h.dtype == dtype);
  if (!packs) return launch_backward<AnyFloat, 1>(args, device, stream);
  return with_float_type(dtype, [&](auto g) { return launch_backward<decltype(g), 4>(args, device, stream); });
}

}  // namespace ddpm_fast
