// ddpm_step: one reverse step in place (DDPM algorithm 2, DDIM eq. 12 and their relatives, by one table row).
//
//   m' = m_u + w (m - m_u)        x0 = clip(a x - b m')        x <- c1 x0 + c2 x + c3 m' [+ c4 x0_prev] [+ s z]
//
// The row is read on the device, so that a captured graph walks through the steps. Where s = 0 no noise is drawn: the
// same branch for all threads.
#include "draw.cuh"
#include "launch.cuh"

namespace ddpm_fast {
namespace {

template <typename Place>
__device__ StepRow step_row(const float* row) {
  if constexpr (Place::kScattered) {
    return {row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7]};
  } else {
    return bits_as<StepRow>(load_pack<8>(row));
  }
}

// x_prev again, in the memory format that x does not have. The four neighbours of a run then lie `channels` apart.
__device__ void store_across(const Array& copy, const Work& work, const Run& at, const Quad& values) {
  const uint32_t element = 4 * at.quad;
  const uint32_t channel = work.by_inner.quotient(element);
  const uint32_t place = element - channel * work.inner;
  const int64_t first = at.sample * work.elements + (place * work.channels + channel);
  with_data<AnyImage>(copy, [&](auto* data) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      assign(data[first + j * work.channels], values[j]);
  });
}
__device__ void store_across(const Array& copy, const Work&, const Scattered& at, const Quad& values) {
  with_data<AnyImage>(copy, [&](auto* data) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (at.has(j)) assign(data[at.offset(j, !at.channels_last)], values[j]);
    }
  });
}

struct Step {
  Quad x0, x_prev;
};

// The formula for a quad. kPlain: nothing optional was given, and z is drawn.
template <bool kPlain, typename M, typename Place>
__device__ Step step(const DdpmStepArgs& args, const Place& at, int64_t row_index, const Quad& x, Quad m) {
  const StepRow row = step_row<Place>(args.table + 8 * row_index);
  if (!kPlain && args.m_uncond) {
    const Quad m_uncond = load_image<M>(args.m_uncond, at);
    const float w = *args.guidance;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      m[j] = guided(m[j], m_uncond[j], w);
  }
  Quad x0, y;
  if (!kPlain && args.threshold != nullptr) {
    const float threshold = args.threshold[at.sample];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      x0[j] = predicted_x0(row, x[j], m[j], threshold);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      x0[j] = predicted_x0(row, x[j], m[j]);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
    y[j] = step_mean(row, x0[j], x[j], m[j]);
  if (!kPlain && args.x0_prev != nullptr) {
    const Quad x0_prev = load_quad(args.x0_prev, at);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      y[j] = y[j] + row.c4 * x0_prev[j];
  }
  if (row.s == 0.0f || (!kPlain && args.noise.values == nullptr && args.noise.rng == nullptr)) return {x0, y};

  const uint32_t stream = 1u + static_cast<uint32_t>(args.t_of_row[row_index]);
  const Quad z = kPlain ? drawn_quad(args.noise, stream, at) : noise_quad(args.noise, stream, at);
  if (!kPlain && args.logvar) {
    const Quad logvar = load_image<AnyFloat>(args.logvar, at);
    if (args.logvar_range != nullptr) {
      const float* limits = args.logvar_range + 2 * row_index;
      const LogvarRange range{limits[0], limits[1]};
#pragma unroll
      for (int j = 0; j < 4; ++j)
        y[j] = y[j] + learned_sigma(range, logvar[j]) * z[j];
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        y[j] = y[j] + learned_sigma(logvar[j]) * z[j];
    }
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      y[j] = y[j] + row.s * z[j];
  }
  return {x0, y};
}

template <bool kPlain, typename M, typename Place>
__global__ void __launch_bounds__(kThreads) ddpm_step_kernel(DdpmStepArgs args, Work work, bool copy_across) {
  const uint32_t thread = thread_index();
  if (thread >= work.threads) return;
  const Place at(work, Item(work, thread));
  const Quad x = load_quad(args.x, at);
  const Quad m = load_image<M>(args.m, at);
  const int64_t row = *args.row;
  Step result;
  if (row >= 0 && row < args.steps) {
    result = step<kPlain, M>(args, at, row, x, m);
  } else {
    const float nan = not_a_number();
    result.x0 = result.x_prev = {nan, nan, nan, nan};
  }
  store_quad(args.x, at, result.x_prev);
  if (!kPlain && args.x0_out != nullptr) store_quad(args.x0_out, at, result.x0);
  if (args.copy_out) {
    if (copy_across) {
      store_across(args.copy_out, work, at, result.x_prev);
    } else {
      store_image<AnyImage>(args.copy_out, at, result.x_prev);
    }
  }
  if (args.bad_row != nullptr) {
    bool finite = true;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      finite = finite && (is_finite(result.x_prev[j]) || !at.has(j));
    if (!finite) atomicCAS(args.bad_row, -1, row < 0 ? 0 : static_cast<int>(row));
  }
}

bool is_plain(const DdpmStepArgs& args) {
  return !args.m_uncond && args.threshold == nullptr && args.x0_prev == nullptr && !args.logvar &&
         args.x0_out == nullptr && args.noise.values == nullptr && args.noise.rng != nullptr;
}

// A run's copy may lie across only when each of its quads is in one channel.
bool in_runs(const DdpmStepArgs& args, bool copy_across) {
  return in_runs(args.shape, args.noise) && aligned(args.x) && aligned(args.m) && aligned(args.m_uncond) &&
         aligned(args.table) && aligned(args.x0_prev) && aligned(args.logvar) && aligned(args.x0_out) &&
         (!args.m_uncond || args.m_uncond.dtype == args.m.dtype) &&
         (copy_across ? !args.shape.channels_last && args.shape.inner % 4 == 0 : aligned(args.copy_out));
}

}  // namespace

Status ddpm_step_cuda(const DdpmStepArgs& args, int device, void* stream) {
  const bool copy_across = args.copy_out && args.copy_channels_last != args.shape.channels_last;
  return for_each_launch(device, args.shape, quads_of(args.shape), [&](const Work& work) {
    if (!in_runs(args, copy_across))
      return launch(ddpm_step_kernel<false, AnyFloat, Scattered>, work.threads, stream, args, work, copy_across);
    return with_float_type(args.m.dtype, [&](auto m) {
      return is_plain(args)
                 ? launch(ddpm_step_kernel<true, decltype(m), Run>, work.threads, stream, args, work, copy_across)
                 : launch(ddpm_step_kernel<false, decltype(m), Run>, work.threads, stream, args, work, copy_across);
    });
  });
}

}  // namespace ddpm_fast
