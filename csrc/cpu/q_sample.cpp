// q_sample: x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps (DDPM eq. 4), with the training target in the same pass.
#include "tile.h"

namespace ddpm_fast {
namespace {

DDPM_FAST_CLONES void noised(NoisingRow row, const float* x0, const float* eps, float* x_t, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    x_t[i] = q_sample_value(row, x0[i], eps[i]);
}

DDPM_FAST_CLONES void
targets(Target target, NoisingRow row, const float* x0, const float* eps, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = target_value(target, row, x0[i], eps[i]);
}

DDPM_FAST_CLONES void
grads_x0(Target target, NoisingRow row, const float* g_x_t, const float* g_target, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = q_sample_grad_x0(target, row, g_x_t[i], g_target[i]);
}

DDPM_FAST_CLONES void
grads_eps(Target target, NoisingRow row, const float* g_x_t, const float* g_target, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = q_sample_grad_eps(target, row, g_x_t[i], g_target[i]);
}

const Tile kZeros{};  // the gradient of an output that was not used

}  // namespace

Status q_sample_cpu(const QSampleArgs& args, int threads) {
  for_each_tile(args.shape, threads, [&](const Run& run) {
    Tile a, b, c;
    const NoisingRow row = noising_row(args.table, args.steps, args.t[run.n]);
    const float* x0 = load(args.x0, args.shape, run, a);
    const float* eps = load_noise(args.noise, args.shape, run, b);
    // The target first: x_t may not be written before x0 has been read for the last time.
    if (args.target != Target::none) {
      float* out = begin_store(args.target_out, args.shape, run, c);
      targets(args.target, row, x0, eps, out, run.count);
      store(args.target_out, args.shape, run, out);
    }
    float* x_t = begin_store(args.x_t, args.shape, run, c);
    noised(row, x0, eps, x_t, run.count);
    store(args.x_t, args.shape, run, x_t);
  });
  return {};
}

Status q_sample_backward_cpu(const QSampleBackwardArgs& args, int threads) {
  for_each_tile(args.shape, threads, [&](const Run& run) {
    Tile a, b, c;
    const NoisingRow row = noising_row(args.table, args.steps, args.t[run.n]);
    const float* g_x_t = args.g_x_t ? load(args.g_x_t, args.shape, run, a) : kZeros.v;
    const float* g_target = args.g_target ? load(args.g_target, args.shape, run, b) : kZeros.v;
    if (args.g_x0) {
      float* out = begin_store(args.g_x0, args.shape, run, c);
      grads_x0(args.target, row, g_x_t, g_target, out, run.count);
      store(args.g_x0, args.shape, run, out);
    }
    if (args.g_eps) {
      float* out = begin_store(args.g_eps, args.shape, run, c);
      grads_eps(args.target, row, g_x_t, g_target, out, run.count);
      store(args.g_eps, args.shape, run, out);
    }
  });
  return {};
}

}  // namespace ddpm_fast
