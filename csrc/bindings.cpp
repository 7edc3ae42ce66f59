// The Python module ddpm_fast._C: pointers come in as integers, errors go out as exceptions. The only files that know
// Python are this one, bindings_norms.cpp and bindings_inference.cpp.
//
// Every op function takes (device, stream_or_threads, ...): device -1 is the CPU and then the second number is how many
// threads may be used; otherwise it is a CUDA device index and the second number is its cudaStream_t.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings.h"
#include "kernels.h"

#ifndef DDPM_FAST_MODULE_NAME
#define DDPM_FAST_MODULE_NAME _C
#endif
#ifndef DDPM_FAST_CUDA_ARCHITECTURES
#define DDPM_FAST_CUDA_ARCHITECTURES ""
#endif

namespace py = pybind11;

namespace ddpm_fast {
namespace {

void normal(
    int device, Address stream, int64_t n, int64_t channels, int64_t inner, bool channels_last, Address out, int dtype,
    Address rng, uint32_t noise_stream
) {
  FillArgs args;
  args.shape = shape_of(n, channels, inner, channels_last);
  args.out = array(out, dtype);
  args.noise.rng = pointer<int64_t>(rng);
  args.noise.stream = noise_stream;
  launch<FillArgs>(args, device, stream, DDPM_FAST_LAUNCHERS(normal));
}

void random_bits(
    int device, Address stream, int64_t n, int64_t elements, Address out, Address rng, uint32_t noise_stream
) {
  FillArgs args;
  args.shape = shape_of(n, 1, elements, false);
  args.bits = pointer<int64_t>(out);
  args.noise.rng = pointer<int64_t>(rng);
  args.noise.stream = noise_stream;
  launch<FillArgs>(args, device, stream, DDPM_FAST_LAUNCHERS(random_bits));
}

Noise noise_of(Address values, Address rng, uint32_t stream, float offset_strength, uint32_t offset_stream) {
  return {pointer<float>(values), pointer<int64_t>(rng), stream, offset_strength, offset_stream};
}

void q_sample(
    int device, Address stream, int64_t n, int64_t channels, int64_t inner, bool channels_last, Address x0,
    int x0_dtype, Address t, Address table, int64_t steps, Address noise, Address rng, uint32_t noise_stream,
    float offset_strength, uint32_t offset_stream, int target, Address x_t, Address target_out, int out_dtype
) {
  QSampleArgs args;
  args.shape = shape_of(n, channels, inner, channels_last);
  args.x0 = array(x0, x0_dtype);
  args.t = pointer<int64_t>(t);
  args.table = pointer<float>(table);
  args.steps = steps;
  args.noise = noise_of(noise, rng, noise_stream, offset_strength, offset_stream);
  args.target = static_cast<Target>(target);
  args.x_t = array(x_t, out_dtype);
  args.target_out = array(target_out, out_dtype);
  launch<QSampleArgs>(args, device, stream, DDPM_FAST_LAUNCHERS(q_sample));
}

void q_sample_backward(
    int device, Address stream, int64_t n, int64_t channels, int64_t inner, bool channels_last, Address g_x_t,
    Address g_target, int g_dtype, Address t, Address table, int64_t steps, int target, Address g_x0, int x0_dtype,
    Address g_eps
) {
  QSampleBackwardArgs args;
  args.shape = shape_of(n, channels, inner, channels_last);
  args.g_x_t = array(g_x_t, g_dtype);
  args.g_target = array(g_target, g_dtype);
  args.t = pointer<int64_t>(t);
  args.table = pointer<float>(table);
  args.steps = steps;
  args.target = static_cast<Target>(target);
  args.g_x0 = array(g_x0, x0_dtype);
  args.g_eps = array(g_eps, static_cast<int>(DType::f32));
  launch<QSampleBackwardArgs>(args, device, stream, DDPM_FAST_LAUNCHERS(q_sample_backward));
}

void add_bias_temb(
    int device, Address stream, int64_t n, int64_t channels, int64_t inner, bool channels_last, Address h, int h_dtype,
    Address bias, int bias_dtype, Address temb, int temb_dtype, bool silu, Address y
) {
  AddBiasTembArgs args;
  args.shape = shape_of(n, channels, inner, channels_last);
  args.h = array(h, h_dtype);
  args.bias = array(bias, bias_dtype);
  args.temb = array(temb, temb_dtype);
  args.silu = silu;
  args.y = array(y, h_dtype);
  launch<AddBiasTembArgs>(args, device, stream, DDPM_FAST_LAUNCHERS(add_bias_temb));
}

void add_bias_temb_backward(
    int device, Address stream, int64_t n, int64_t channels, int64_t inner, bool channels_last, Address g, int g_dtype,
    Address h, int h_dtype, Address bias, int bias_dtype, bool silu, Address g_h, Address gh_sum, Address g_sum
) {
  AddBiasTembBackwardArgs args;
  args.shape = shape_of(n, channels, inner, channels_last);
  args.g = array(g, g_dtype);
  args.h = array(h, h_dtype);
  args.bias = array(bias, bias_dtype);
  args.silu = silu;
  args.g_h = array(g_h, h_dtype);
  args.gh_sum = pointer<float>(gh_sum);
  args.g_sum = pointer<float>(g_sum);
  launch<AddBiasTembBackwardArgs>(args, device, stream, DDPM_FAST_LAUNCHERS(add_bias_temb_backward));
}

void ddpm_step(
    int device, Address stream, int64_t n, int64_t channels, int64_t inner, bool channels_last, Address x, Address m,
    int m_dtype, Address m_uncond, int m_uncond_dtype, Address guidance, Address table, Address t_of_row, int64_t steps,
    Address row, Address noise, Address rng, Address x0_prev, Address logvar, int logvar_dtype, Address logvar_range,
    Address threshold, Address x0_out, Address copy_out, int copy_dtype, bool copy_channels_last, Address bad_row
) {
  DdpmStepArgs args;
  args.shape = shape_of(n, channels, inner, channels_last);
  args.x = pointer<float>(x);
  args.m = array(m, m_dtype);
  args.m_uncond = array(m_uncond, m_uncond_dtype);
  args.guidance = pointer<float>(guidance);
  args.table = pointer<float>(table);
  args.t_of_row = pointer<int32_t>(t_of_row);
  args.steps = steps;
  args.row = pointer<int64_t>(row);
  args.noise = noise_of(noise, rng, 0, 0.0f, 0);
  args.x0_prev = pointer<float>(x0_prev);
  args.logvar = array(logvar, logvar_dtype);
  args.logvar_range = pointer<float>(logvar_range);
  args.threshold = pointer<float>(threshold);
  args.x0_out = pointer<float>(x0_out);
  args.copy_out = array(copy_out, copy_dtype);
  args.copy_channels_last = copy_channels_last;
  args.bad_row = pointer<int32_t>(bad_row);
  launch<DdpmStepArgs>(args, device, stream, DDPM_FAST_LAUNCHERS(ddpm_step));
}

NoiseMseArgs noise_mse_args(
    const Shape& shape, const Array& pred, const Array& x0, Address t, Address table, int64_t steps, const Noise& noise,
    int target, int loss, float huber_delta
) {
  NoiseMseArgs args;
  args.shape = shape;
  args.pred = pred;
  args.x0 = x0;
  args.t = pointer<int64_t>(t);
  args.table = pointer<float>(table);
  args.steps = steps;
  args.noise = noise;
  args.target = static_cast<Target>(target);
  args.loss = static_cast<Loss>(loss);
  args.huber_delta = huber_delta;
  return args;
}

void noise_mse(
    int device, Address stream, int64_t n, int64_t channels, int64_t inner, bool channels_last, Address pred,
    int pred_dtype, Address x0, int x0_dtype, Address t, Address table, int64_t steps, Address noise, Address rng,
    uint32_t noise_stream, float offset_strength, uint32_t offset_stream, int target, int loss, float huber_delta,
    Address out, Address workspace, int64_t workspace_columns
) {
  NoiseMseArgs args = noise_mse_args(
      shape_of(n, channels, inner, channels_last), array(pred, pred_dtype), array(x0, x0_dtype), t, table, steps,
      noise_of(noise, rng, noise_stream, offset_strength, offset_stream), target, loss, huber_delta
  );
  args.out = pointer<float>(out);
  args.workspace = pointer<float>(workspace);
  args.workspace_columns = workspace_columns;
  launch<NoiseMseArgs>(args, device, stream, DDPM_FAST_LAUNCHERS(noise_mse));
}

void noise_mse_backward(
    int device, Address stream, int64_t n, int64_t channels, int64_t inner, bool channels_last, Address pred,
    int pred_dtype, Address x0, int x0_dtype, Address t, Address table, int64_t steps, Address noise, Address rng,
    uint32_t noise_stream, float offset_strength, uint32_t offset_stream, int target, int loss, float huber_delta,
    Address g_out, Address g_pred
) {
  NoiseMseArgs args = noise_mse_args(
      shape_of(n, channels, inner, channels_last), array(pred, pred_dtype), array(x0, x0_dtype), t, table, steps,
      noise_of(noise, rng, noise_stream, offset_strength, offset_stream), target, loss, huber_delta
  );
  args.g_out = pointer<float>(g_out);
  args.g_pred = array(g_pred, pred_dtype);
  launch<NoiseMseArgs>(args, device, stream, DDPM_FAST_LAUNCHERS(noise_mse_backward));
}

#if defined(DDPM_FAST_HAS_CUDA)
// "13.0" from 13000
std::string version_text(int version) {
  return version <= 0 ? "" : std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
#if defined(DDPM_FAST_HAS_CUDA)
  const CudaInfo cuda = cuda_info();
  info["cuda"] = true;
  info["cuda_architectures"] = DDPM_FAST_CUDA_ARCHITECTURES;
  info["cuda_runtime"] = version_text(cuda.runtime_version);
  info["cuda_driver"] = version_text(cuda.driver_version);
  info["cuda_devices"] = cuda.device_count;
  info["cuda_error"] = cuda.error == nullptr ? "" : cuda.error;
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace
}  // namespace ddpm_fast

PYBIND11_MODULE(DDPM_FAST_MODULE_NAME, m) {
  m.doc() = "The compiled kernels of ddpm_fast; call them through ddpm_fast.ops.";
  m.def("build_info", &ddpm_fast::build_info);
  m.def("normal", &ddpm_fast::normal);
  m.def("random_bits", &ddpm_fast::random_bits);
  m.def("q_sample", &ddpm_fast::q_sample);
  m.def("q_sample_backward", &ddpm_fast::q_sample_backward);
  m.def("add_bias_temb", &ddpm_fast::add_bias_temb);
  m.def("add_bias_temb_backward", &ddpm_fast::add_bias_temb_backward);
  ddpm_fast::bind_norms(m);
  m.def("ddpm_step", &ddpm_fast::ddpm_step);
  m.def("noise_mse", &ddpm_fast::noise_mse);
  m.def("noise_mse_backward", &ddpm_fast::noise_mse_backward);
#if defined(DDPM_FAST_INFERENCE)
  ddpm_fast::bind_inference(m);
#endif
}
