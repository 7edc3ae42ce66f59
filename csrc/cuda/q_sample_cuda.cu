// q_sample: x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps (DDPM eq. 4), with the training target in the same pass.
#include "draw.cuh"
#include "launch.cuh"

namespace ddpm_fast {
namespace {

template <typename X0, typename Out, typename Place>
__global__ void __launch_bounds__(kThreads) q_sample_kernel(QSampleArgs args, Work work) {
  const uint32_t thread = thread_index();
  if (thread >= work.threads) return;
  const Place at(work, Item(work, thread));
  const Quad x0 = load_image<X0>(args.x0, at);
  const NoisingRow row = noising_row(args.table, args.steps, args.t[at.sample]);
  const Quad eps = noise_quad(args.noise, args.noise.stream, at);
  Quad x_t;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    x_t[j] = q_sample_value(row, x0[j], eps[j]);
  store_image<Out>(args.x_t, at, x_t);
  if (args.target == Target::none) return;
  Quad target;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    target[j] = target_value(args.target, row, x0[j], eps[j]);
  store_image<Out>(args.target_out, at, target);
}

// The transposed map. A gradient that is missing is zero.
template <typename G, typename Place>
__global__ void __launch_bounds__(kThreads) q_sample_backward_kernel(QSampleBackwardArgs args, Work work) {
  const uint32_t thread = thread_index();
  if (thread >= work.threads) return;
  const Place at(work, Item(work, thread));
  const Quad g_x_t = args.g_x_t ? load_image<G>(args.g_x_t, at) : Quad{};
  const Quad g_target = args.g_target ? load_image<G>(args.g_target, at) : Quad{};
  const NoisingRow row = noising_row(args.table, args.steps, args.t[at.sample]);
  Quad out;
  if (args.g_x0) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      out[j] = q_sample_grad_x0(args.target, row, g_x_t[j], g_target[j]);
    store_image<AnyFloat>(args.g_x0, at, out);
  }
  if (args.g_eps) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      out[j] = q_sample_grad_eps(args.target, row, g_x_t[j], g_target[j]);
    store_image<float>(args.g_eps, at, out);
  }
}

bool in_runs(const QSampleArgs& args) {
  return in_runs(args.shape, args.noise) && aligned(args.x0) && aligned(args.x_t) && aligned(args.target_out) &&
         (!args.target_out || args.target_out.dtype == args.x_t.dtype);
}

bool in_runs(const QSampleBackwardArgs& args) {
  return in_runs(args.shape, Noise{}) && aligned(args.g_x_t) && aligned(args.g_target) && aligned(args.g_x0) &&
         aligned(args.g_eps) && (!args.g_x_t || !args.g_target || args.g_x_t.dtype == args.g_target.dtype);
}

}  // namespace

Status q_sample_cuda(const QSampleArgs& args, int device, void* stream) {
  return for_each_launch(device, args.shape, quads_of(args.shape), [&](const Work& work) {
    if (!in_runs(args)) return launch(q_sample_kernel<AnyImage, AnyFloat, Scattered>, work.threads, stream, args, work);
    return with_float_type(args.x_t.dtype, [&](auto out) {
      using Out = decltype(out);
      if (args.x0.dtype == DType::u8)
        return launch(q_sample_kernel<uint8_t, Out, Run>, work.threads, stream, args, work);
      return with_float_type(args.x0.dtype, [&](auto x0) {
        return launch(q_sample_kernel<decltype(x0), Out, Run>, work.threads, stream, args, work);
      });
    });
  });
}

Status q_sample_backward_cuda(const QSampleBackwardArgs& args, int device, void* stream) {
  return for_each_launch(device, args.shape, quads_of(args.shape), [&](const Work& work) {
    if (!in_runs(args)) return launch(q_sample_backward_kernel<AnyFloat, Scattered>, work.threads, stream, args, work);
    return with_float_type((args.g_x_t ? args.g_x_t : args.g_target).dtype, [&](auto g) {
      return launch(q_sample_backward_kernel<decltype(g), Run>, work.threads, stream, args, work);
    });
  });
}

}  // namespace ddpm_fast
