// noise_mse: the loss between a prediction and its target, the target's noise drawn again instead of stored.
//
//   out[n] = mean over elements of loss(pred - target), target = eps, x0 or sqrt(ab_t) eps - sqrt(1 - ab_t) x0
//   g_pred = g[n] / E * loss'(pred - target)
//
// The sum of a tile is taken in float64 over eight lanes, those of the tiles in order, so it does not depend on
// threads.
#include <vector>

#include "tile.h"

namespace ddpm_fast {
namespace {

DDPM_FAST_CLONES void subtract(const float* a, const float* b, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = a[i] - b[i];
}

DDPM_FAST_CLONES void velocity(NoisingRow row, const float* x0, const float* eps, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = target_value(Target::v, row, x0[i], eps[i]);
}

DDPM_FAST_CLONES void losses(Loss loss, float delta, const float* d, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = loss_value(loss, d[i], delta);
}

DDPM_FAST_CLONES void scaled_grads(Loss loss, float delta, float scale, const float* d, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = scale * loss_grad(loss, d[i], delta);
}

// pred - target of a run; the result may lie in any of the tiles.
const float* difference(const NoiseMseArgs& args, const Run& run, Tile& a, Tile& b, Tile& c) {
  const float* target;
  if (args.target == Target::x0) {
    target = load(args.x0, args.shape, run, b);
  } else {
    target = load_noise(args.noise, args.shape, run, b);
    if (args.target == Target::v) {
      const NoisingRow row = noising_row(args.table, args.steps, args.t[run.n]);
      velocity(row, load(args.x0, args.shape, run, a), target, c.v, run.count);
      target = c.v;
    }
  }
  const float* pred = load(args.pred, args.shape, run, a);
  subtract(pred, target, c.v, run.count);
  return c.v;
}

}  // namespace

Status noise_mse_cpu(const NoiseMseArgs& args, int threads) {
  const int64_t elements = args.shape.elements();
  const int64_t tiles = (elements + kTile - 1) / kTile;
  std::vector<double> sums(static_cast<size_t>(args.shape.n * tiles));
  for_each_tile(args.shape, threads, [&](const Run& run) {
    Tile a, b, c;
    const float* d = difference(args, run, a, b, c);
    losses(args.loss, args.huber_delta, d, a.v, run.count);
    sums[static_cast<size_t>(run.n * tiles + run.first / kTile)] = sum_of(a.v, run.count);
  });
  for (int64_t n = 0; n < args.shape.n; ++n) {
    double sum = 0.0;
    for (int64_t tile = 0; tile < tiles; ++tile)
      sum += sums[static_cast<size_t>(n * tiles + tile)];
    args.out[n] = static_cast<float>(sum / static_cast<double>(elements));
  }
  return {};
}

Status noise_mse_backward_cpu(const NoiseMseArgs& args, int threads) {
  const float elements = static_cast<float>(args.shape.elements());
  for_each_tile(args.shape, threads, [&](const Run& run) {
    Tile a, b, c;
    const float* d = difference(args, run, a, b, c);
    float* out = begin_store(args.g_pred, args.shape, run, a);
    scaled_grads(args.loss, args.huber_delta, args.g_out[run.n] / elements, d, out, run.count);
    store(args.g_pred, args.shape, run, out);
  });
  return {};
}

}  // namespace ddpm_fast
