// noise_mse: the loss between a prediction and its target, the target's noise drawn again instead of stored.
//
//   out[n] = mean over elements of loss(pred - target), target = eps, x0 or sqrt(ab_t) eps - sqrt(1 - ab_t) x0
//   g_pred = g[n] / E * loss'(pred - target)
//
// The sum of a tile is taken in float64 over many lanes, those of the tiles in order, so it does not depend on
// threads.
#include <vector>

#include "tile.h"

namespace ddpm_fast {
namespace {

DDPM_FAST_CLONES void velocity(NoisingRow row, const float* x0, const float* eps, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = target_value(Target::v, row, x0[i], eps[i]);
}

// The kind of loss is a constant in each of these loops: decided inside, every kind would be computed and one selected.
DDPM_FAST_HD double sum_of_kind(Loss loss, float delta, const float* pred, const float* target, int64_t count) {
  constexpr int kLanes = 32;  // they vectorise and do not wait for each other
  double lanes[kLanes] = {};
  const int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int k = 0; k < kLanes; ++k)
      lanes[k] += static_cast<double>(loss_value(loss, pred[i + k] - target[i + k], delta));
  }
  for (int64_t i = whole; i < count; ++i) {
    lanes[i - whole] += static_cast<double>(loss_value(loss, pred[i] - target[i], delta));
  }
  double sum = 0.0;
  for (int k = 0; k < kLanes; ++k)
    sum += lanes[k];
  return sum;
}
DDPM_FAST_CLONES double sum_of_losses(Loss loss, float delta, const float* pred, const float* target, int64_t count) {
  if (loss == Loss::mse) return sum_of_kind(Loss::mse, delta, pred, target, count);
  if (loss == Loss::l1) return sum_of_kind(Loss::l1, delta, pred, target, count);
  return sum_of_kind(Loss::huber, delta, pred, target, count);
}

DDPM_FAST_HD void
grads_of_kind(Loss loss, float delta, float scale, const float* pred, const float* target, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = scale * loss_grad(loss, pred[i] - target[i], delta);
}
DDPM_FAST_CLONES void
scaled_grads(Loss loss, float delta, float scale, const float* pred, const float* target, float* out, int64_t count) {
  if (loss == Loss::mse) return grads_of_kind(Loss::mse, delta, scale, pred, target, out, count);
  if (loss == Loss::l1) return grads_of_kind(Loss::l1, delta, scale, pred, target, out, count);
  grads_of_kind(Loss::huber, delta, scale, pred, target, out, count);
}

// The target of a run; it may lie in either tile or in the array itself. `scratch` is used on the way.
const float* target_of(const NoiseMseArgs& args, const Run& run, Tile& tile, Tile& scratch) {
  if (args.target == Target::x0) return load(args.x0, args.shape, run, tile);
  const float* eps = load_noise(args.noise, args.shape, run, tile);
  if (args.target == Target::eps) return eps;
  const NoisingRow row = noising_row(args.table, args.steps, args.t[run.n]);
  velocity(row, load(args.x0, args.shape, run, scratch), eps, tile.v, run.count);
  return tile.v;
}

}  // namespace

Status noise_mse_cpu(const NoiseMseArgs& args, int threads) {
  const int64_t elements = args.shape.elements();
  const int64_t tiles = (elements + kTile - 1) / kTile;
  std::vector<double> sums(static_cast<size_t>(args.shape.n * tiles));
  for_each_tile(args.shape, threads, [&](const Run& run) {
    Tile a, b;
    const float* target = target_of(args, run, b, a);
    const float* pred = load(args.pred, args.shape, run, a);
    sums[static_cast<size_t>(run.n * tiles + run.first / kTile)] =
        sum_of_losses(args.loss, args.huber_delta, pred, target, run.count);
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
    const float* target = target_of(args, run, b, a);
    const float* pred = load(args.pred, args.shape, run, a);
    float* out = begin_store(args.g_pred, args.shape, run, c);
    scaled_grads(args.loss, args.huber_delta, args.g_out[run.n] / elements, pred, target, out, run.count);
    store(args.g_pred, args.shape, run, out);
  });
  return {};
}

}  // namespace ddpm_fast
