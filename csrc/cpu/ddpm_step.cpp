// ddpm_step: one reverse step in place (DDPM algorithm 2, DDIM eq. 12 and their relatives, by one table row).
//
//   m' = m_u + w (m - m_u)        x0 = clip(a x - b m')        x <- c1 x0 + c2 x + c3 m' [+ c4 x0_prev] [+ s z]
#include <atomic>

#include "tile.h"

namespace ddpm_fast {
namespace {

StepRow step_row(const float* table, int64_t steps, int64_t row) {
  const float nan = not_a_number();
  if (row < 0 || row >= steps) return {nan, nan, nan, nan, nan, nan, 0.0f, nan};
  const float* r = table + 8 * row;
  return {r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7]};
}

DDPM_FAST_CLONES void guide(float w, const float* m, const float* m_uncond, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = guided(m[i], m_uncond[i], w);
}

DDPM_FAST_CLONES void predict(const StepRow& step, const float* x, const float* m, float* x0, int64_t count) {
  const StepRow row = step;
  for (int64_t i = 0; i < count; ++i)
    x0[i] = predicted_x0(row, x[i], m[i]);
}

DDPM_FAST_CLONES void
predict_thresholded(const StepRow& step, float threshold, const float* x, const float* m, float* x0, int64_t count) {
  const StepRow row = step;
  for (int64_t i = 0; i < count; ++i)
    x0[i] = predicted_x0(row, x[i], m[i], threshold);
}

DDPM_FAST_CLONES void
mean(const StepRow& step, const float* x0, const float* x, const float* m, float* y, int64_t count) {
  const StepRow row = step;
  for (int64_t i = 0; i < count; ++i)
    y[i] = step_mean(row, x0[i], x[i], m[i]);
}

DDPM_FAST_CLONES void add_scaled(float scale, const float* z, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    y[i] = y[i] + scale * z[i];
}

DDPM_FAST_CLONES void add_learned(const float* logvar, const float* z, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    y[i] = y[i] + learned_sigma(logvar[i]) * z[i];
}

DDPM_FAST_CLONES void
add_learned_between(const LogvarRange& limits, const float* v, const float* z, float* y, int64_t count) {
  const LogvarRange range = limits;
  for (int64_t i = 0; i < count; ++i)
    y[i] = y[i] + learned_sigma(range, v[i]) * z[i];
}

DDPM_FAST_CLONES bool all_finite(const float* y, int64_t count) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < count; ++i)
    bad |= is_finite(y[i]) ? 0u : 1u;
  return bad == 0;
}

}  // namespace

Status ddpm_step_cpu(const DdpmStepArgs& args, int threads) {
  const int64_t row_index = *args.row;
  const StepRow row = step_row(args.table, args.steps, row_index);
  const bool noisy = row.s != 0.0f && (args.noise.values != nullptr || args.noise.rng != nullptr);
  Noise noise = args.noise;
  if (noisy) noise.stream = 1u + static_cast<uint32_t>(args.t_of_row[row_index]);
  LogvarRange range{};
  if (noisy && args.logvar_range != nullptr) {
    range = {args.logvar_range[2 * row_index], args.logvar_range[2 * row_index + 1]};
  }
  const bool x0_is_stored_early = args.x0_out != nullptr && args.x0_out != args.x0_prev;
  const Array x_array{args.x, DType::f32};
  const Array x0_array{args.x0_out, DType::f32};
  Shape copy_shape = args.shape;
  copy_shape.channels_last = args.copy_channels_last;
  std::atomic<bool> bad{false};

  for_each_tile(args.shape, threads, [&](const Run& run) {
    Tile a, b, c, d, e;
    const float* x = load(x_array, args.shape, run, a);
    const float* m = load(args.m, args.shape, run, b);
    if (args.m_uncond) {
      const float* m_uncond = load(args.m_uncond, args.shape, run, c);
      guide(*args.guidance, m, m_uncond, b.v, run.count);
      m = b.v;
    }
    float* x0 = x0_is_stored_early ? begin_store(x0_array, args.shape, run, d) : d.v;
    if (args.threshold != nullptr) {
      predict_thresholded(row, args.threshold[run.n], x, m, x0, run.count);
    } else {
      predict(row, x, m, x0, run.count);
    }
    mean(row, x0, x, m, e.v, run.count);
    if (args.x0_prev != nullptr) {
      add_scaled(row.c4, load(args.x0_prev, args.shape, run, a), e.v, run.count);
    }
    if (args.x0_out != nullptr) store(x0_array, args.shape, run, x0);
    if (noisy) {
      const float* z = load_noise(noise, args.shape, run, c);
      if (args.logvar && args.logvar_range != nullptr) {
        add_learned_between(range, load(args.logvar, args.shape, run, d), z, e.v, run.count);
      } else if (args.logvar) {
        add_learned(load(args.logvar, args.shape, run, d), z, e.v, run.count);
      } else {
        add_scaled(row.s, z, e.v, run.count);
      }
    }
    store(x_array, args.shape, run, e.v);
    if (args.copy_out) store(args.copy_out, copy_shape, run, e.v);
    if (args.bad_row != nullptr && !all_finite(e.v, run.count)) bad.store(true, std::memory_order_relaxed);
  });

  if (bad.load() && *args.bad_row < 0) *args.bad_row = static_cast<int32_t>(std::max<int64_t>(row_index, 0));
  return {};
}

}  // namespace ddpm_fast
