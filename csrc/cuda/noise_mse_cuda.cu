// noise_mse: the training loss of each sample, its noise regenerated instead of stored.
//
//   out[n] = mean over e of loss(pred - target)            target = eps, x0 or v
//   g_pred = g_out[n] / E * loss'(pred - target)
//
// Forward in two steps: each (sample, column) is summed by one group of threads, then the columns of a sample are
// added. The order is fixed, so the loss is the same every time.
#include "draw.cuh"
#include "reduce.cuh"

namespace ddpm_fast {
namespace {

template <typename Pred, typename Place>
__device__ Quad difference(const NoiseMseArgs& args, const Place& at) {
  Quad d = load_image<Pred>(args.pred, at);
  const bool needs_x0 = args.target != Target::eps;
  const Quad x0 = needs_x0 ? load_image<AnyImage>(args.x0, at) : Quad{};
  const NoisingRow row =
      args.target == Target::v ? noising_row(args.table, args.steps, args.t[at.sample]) : NoisingRow{};
  const Quad eps = args.target != Target::x0 ? noise_quad(args.noise, args.noise.stream, at) : Quad{};
#pragma unroll
  for (int j = 0; j < 4; ++j)
    d[j] = d[j] - target_value(args.target, row, x0[j], eps[j]);
  return d;
}

// A group takes every columns-th quad of its sample. Groups beyond the last sample only take part in the sum.
template <int kGroup, typename Pred, typename Place>
__global__ void __launch_bounds__(kThreads) noise_mse_kernel(
    NoiseMseArgs args, Work work, uint32_t quads, uint32_t columns, float* out
) {
  const uint32_t thread = thread_index();
  const Item item(work, thread);
  Sum sum;
  if (thread < work.threads) {
    for (uint32_t quad = item.index; quad < quads; quad += columns * kGroup) {
      const Place at(work, Item(item.sample, quad));
      Quad losses = difference<Pred>(args, at);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        losses[j] = at.has(j) ? loss_value(args.loss, losses[j], args.huber_delta) : 0.0f;
      sum.add(sum_of(losses));
    }
  }
  float total = group_sum<kGroup>(sum.total());
  if (thread >= work.threads || item.index % kGroup != 0) return;
  if (columns == 1) total = total / static_cast<float>(work.elements);
  out[item.sample * columns + item.index / kGroup] = total;
}

// A warp per sample adds its columns.
__global__ void
__launch_bounds__(kThreads) noise_mse_columns_kernel(const float* parts, Work work, uint32_t columns, float* out) {
  const uint32_t thread = thread_index();
  const Item item(work, thread);
  Sum sum;
  if (thread < work.threads) {
    for (uint32_t column = item.index; column < columns; column += 32)
      sum.add(parts[item.sample * columns + column]);
  }
  const float total = group_sum<32>(sum.total());
  if (thread < work.threads && item.index == 0) out[item.sample] = total / static_cast<float>(work.elements);
}

template <typename Pred, typename Place>
__global__ void __launch_bounds__(kThreads) noise_mse_backward_kernel(NoiseMseArgs args, Work work) {
  const uint32_t thread = thread_index();
  if (thread >= work.threads) return;
  const Place at(work, Item(work, thread));
  const float scale = args.g_out[at.sample] / static_cast<float>(work.elements);
  Quad g = difference<Pred>(args, at);
#pragma unroll
  for (int j = 0; j < 4; ++j)
    g[j] = scale * loss_grad(args.loss, g[j], args.huber_delta);
  store_image<Pred>(args.g_pred, at, g);
}

bool in_runs(const NoiseMseArgs& args) {
  Noise noise = args.noise;
  if (args.target == Target::x0) noise = {};  // not drawn
  return in_runs(args.shape, noise) && aligned(args.pred) && aligned(args.x0) && aligned(args.g_pred) &&
         (!args.g_pred || args.g_pred.dtype == args.pred.dtype);
}

template <int kGroup>
Status launch_sums(const NoiseMseArgs& args, const Work& work, uint32_t columns, float* out, void* stream) {
  const uint32_t quads = static_cast<uint32_t>(quads_of(args.shape));
  if (!in_runs(args))
    return launch(noise_mse_kernel<kGroup, AnyFloat, Scattered>, work.threads, stream, args, work, quads, columns, out);
  return with_float_type(args.pred.dtype, [&](auto pred) {
    return launch(noise_mse_kernel<kGroup, decltype(pred), Run>, work.threads, stream, args, work, quads, columns, out);
  });
}

}  // namespace

Status noise_mse_cuda(const NoiseMseArgs& args, int device, void* stream) {
  constexpr int64_t kWarp = 32, kQuadsPerThread = 8;
  const int64_t quads = quads_of(args.shape);
  const bool small = quads <= kQuadsPerThread * kWarp;  // then a warp per sample does, else blocks
  const int64_t wanted = (quads + kQuadsPerThread * kThreads - 1) / (kQuadsPerThread * kThreads);
  const int64_t allowed = args.workspace != nullptr && args.workspace_columns > 1 ? args.workspace_columns : 1;
  const int64_t columns = small ? 1 : wanted < allowed ? wanted : allowed;
  float* sums = columns == 1 ? args.out : args.workspace;
  const Status status =
      for_each_launch(device, args.shape, columns * (small ? kWarp : kThreads), [&](const Work& work) {
        return small ? launch_sums<32>(args, work, static_cast<uint32_t>(columns), sums, stream)
                     : launch_sums<kThreads>(args, work, static_cast<uint32_t>(columns), sums, stream);
      });
  if (!status.ok() || columns == 1) return status;
  return for_each_launch(device, args.shape, kWarp, [&](const Work& work) {
    return launch(
        noise_mse_columns_kernel, work.threads, stream, static_cast<const float*>(sums), work,
        static_cast<uint32_t>(columns), args.out
    );
  });
}

Status noise_mse_backward_cuda(const NoiseMseArgs& args, int device, void* stream) {
  return for_each_launch(device, args.shape, quads_of(args.shape), [&](const Work& work) {
    if (!in_runs(args)) return launch(noise_mse_backward_kernel<AnyFloat, Scattered>, work.threads, stream, args, work);
    return with_float_type(args.pred.dtype, [&](auto pred) {
      return launch(noise_mse_backward_kernel<decltype(pred), Run>, work.threads, stream, args, work);
    });
  });
}

}  // namespace ddpm_fast
