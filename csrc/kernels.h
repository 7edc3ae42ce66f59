// The C++ interface of the library: plain structs of pointers and sizes, one launcher per op and device. No torch, no
// Python.
//
// Every array that an op calls an image has the same shape (n samples of channels x inner elements, for example
// (N, C, H * W)) and the same dense memory format; the Python side (ddpm_fast/backends/native.py) sees to that. The
// index of an element in the noise is its place in contiguous (C, H, W) order whatever the memory format.
#pragma once

#include <cstdint>

#include "ddpm_math.h"

namespace ddpm_fast {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, u8 = 3 };

struct Array {
  void* data = nullptr;  // null: the optional argument was not given
  DType dtype = DType::f32;
  DDPM_FAST_HD explicit operator bool() const { return data != nullptr; }
};

struct Shape {
  int64_t n = 0, channels = 0, inner = 0;
  bool channels_last = false;
  int64_t elements() const { return channels * inner; }
};

// Where the standard normals of an op come from: the given array, else normal(rng[0], rng[1] + i, stream, element).
struct Noise {
  const float* values = nullptr;  // [n, elements] in the format of the images
  const int64_t* rng = nullptr;   // seed, first sample; on the op's device
  uint32_t stream = 0;
  float offset_strength = 0.0f;  // adds strength * normal(..., offset_stream, channel) to each channel
  uint32_t offset_stream = 0;
};

// null message: success. Otherwise what went wrong, in static storage.
struct Status {
  const char* message = nullptr;
  bool ok() const { return message == nullptr; }
};

struct FillArgs {  // normal, random_bits
  Shape shape;
  Array out;                // normal: any float; random_bits: int64 values
  int64_t* bits = nullptr;  // random_bits only
  Noise noise;
};

struct QSampleArgs {
  Shape shape;
  Array x0;                      // u8 is read as x / 127.5 - 1
  const int64_t* t = nullptr;    // [n]
  const float* table = nullptr;  // [steps, 2]: NoisingRow
  int64_t steps = 0;
  Noise noise;
  Target target = Target::none;
  Array x_t, target_out;  // target_out: when target != none
};

struct QSampleBackwardArgs {
  Shape shape;
  Array g_x_t, g_target;  // either may be missing
  const int64_t* t = nullptr;
  const float* table = nullptr;
  int64_t steps = 0;
  Target target = Target::none;
  Array g_x0, g_eps;  // either may be missing; g_eps is float32
};

struct AddBiasTembArgs {
  Shape shape;
  Array h, bias, temb;  // bias [channels], temb [n, channels]; both optional
  bool silu = false;
  Array y;
};

struct AddBiasTembBackwardArgs {
  Shape shape;
  Array g, h, bias;  // h and bias only with silu
  bool silu = false;
  Array g_h;                // optional
  float* g_sum = nullptr;   // [n, channels]: sum of g over inner; optional
  float* gh_sum = nullptr;  // [n, channels]: sum of g_h over inner; optional
};

// group_norm_silu, forward and backward. weight and beta are [channels] or, with *_per_sample, [n, channels].
struct GroupNormSiluArgs {
  Shape shape;
  int64_t groups = 1;   // divides shape.channels
  Array h, bias, temb;  // bias [channels], temb [n, channels]; both optional
  Array weight, beta;   // both optional
  bool weight_per_sample = false, beta_per_sample = false;
  bool silu = false;
  float eps = 0.0f;                              // forward
  Array y;                                       // forward
  float *mean = nullptr, *rstd = nullptr;        // [n, groups]: written by the forward pass, read by the backward pass
  Array g;                                       // backward
  Array g_h;                                     // backward; optional
  float* g_sum = nullptr;                        // backward, [n, channels]: sum of g_h over inner; optional
  float *d_weight = nullptr, *d_beta = nullptr;  // backward, [n, channels]: sums of g_u xhat and of g_u
  int64_t parts = 1;  // CUDA: into how many parts of places a group is cut; more than 1 take several launches
  // CUDA, parts > 1: [n, groups, parts, 2] floats; backward [n, channels, parts, 3] and [n, groups, 2] behind them.
  float* workspace = nullptr;
  int64_t group_channels() const { return shape.channels / groups; }
};

// rms_norm_silu, forward and backward. weight and beta are [channels] or, with *_per_sample, [n, channels].
struct RmsNormSiluArgs {
  Shape shape;
  Array h;
  Array weight, beta;  // both optional
  bool weight_per_sample = false, beta_per_sample = false;
  bool silu = false;
  float eps = 0.0f;
  Array residual;  // forward; optional; an image in h's dtype
  Array y;         // forward
  Array g;         // backward
  Array g_h;       // backward; optional
  float *d_weight = nullptr,
        *d_beta = nullptr;     // backward, [n, channels]: sums of g_u xhat and of g_u; both or neither
  int64_t parts = 1;           // CUDA, backward: into how many parts the places of a sample are cut for these sums
  float* workspace = nullptr;  // CUDA, parts > 1: [n, parts, channels, 2] floats
};

// batch_norm_silu, forward and backward.
struct BatchNormSiluArgs {
  Shape shape;
  Array h;
  Array temb;            // forward; [n, channels]; optional
  Array weight, bias;    // [channels]; both optional
  bool of_batch = true;  // whether mean and var are those of h, which the forward pass then writes
  bool silu = false;
  float eps = 0.0f;
  float *mean = nullptr, *var = nullptr;         // [channels]; var is the biased one
  Array y;                                       // forward
  Array g;                                       // backward
  Array g_h;                                     // backward; optional
  float* g_temb = nullptr;                       // backward, [n, channels]: sums of g; optional
  float *d_weight = nullptr, *d_bias = nullptr;  // backward, [channels]: sums of g_u xhat and of g_u
  int64_t parts = 1;                             // CUDA: into how many parts the places of a sample are cut for sums
  float* workspace = nullptr;                    // CUDA: [n, parts, channels, 3] floats and [channels, 2] behind them
};

struct DdpmStepArgs {
  Shape shape;
  float* x = nullptr;  // in place
  Array m, m_uncond;
  const float* guidance = nullptr;    // [1], with m_uncond
  const float* table = nullptr;       // [steps, 8]: StepRow
  const int32_t* t_of_row = nullptr;  // [steps]
  int64_t steps = 0;
  const int64_t* row = nullptr;      // [1]
  Noise noise;                       // stream is 1 + t_of_row[row]
  const float* x0_prev = nullptr;    // may be x0_out
  const float* threshold = nullptr;  // [n]
  Array logvar;
  const float* logvar_range = nullptr;  // [steps, 2]: LogvarRange; with it, logvar is v in [-1, 1]
  float* x0_out = nullptr;
  Array copy_out;  // x_prev again, in copy_shape's memory format; u8 is rounded
  bool copy_channels_last = false;
  int32_t* bad_row = nullptr;  // [1]: set to row if it is negative and a non-finite value was written
};

struct NoiseMseArgs {
  Shape shape;
  Array pred, x0;              // x0 for targets x0 and v; u8 as in q_sample
  const int64_t* t = nullptr;  // for target v
  const float* table = nullptr;
  int64_t steps = 0;
  Noise noise;
  Target target = Target::eps;
  Loss loss = Loss::mse;
  float huber_delta = 1.0f;
  float* out = nullptr;           // forward: [n], mean loss of each sample
  const float* g_out = nullptr;   // backward: [n]
  Array g_pred;                   // backward
  float* workspace = nullptr;     // forward: [n, workspace_columns] floats of scratch
  int64_t workspace_columns = 0;  // how many partial sums a sample may use
};

Status normal_cpu(const FillArgs& args, int threads);
Status random_bits_cpu(const FillArgs& args, int threads);
Status q_sample_cpu(const QSampleArgs& args, int threads);
Status q_sample_backward_cpu(const QSampleBackwardArgs& args, int threads);
Status add_bias_temb_cpu(const AddBiasTembArgs& args, int threads);
Status add_bias_temb_backward_cpu(const AddBiasTembBackwardArgs& args, int threads);
Status group_norm_silu_cpu(const GroupNormSiluArgs& args, int threads);
Status group_norm_silu_backward_cpu(const GroupNormSiluArgs& args, int threads);
Status rms_norm_silu_cpu(const RmsNormSiluArgs& args, int threads);
Status rms_norm_silu_backward_cpu(const RmsNormSiluArgs& args, int threads);
Status batch_norm_silu_cpu(const BatchNormSiluArgs& args, int threads);
Status batch_norm_silu_backward_cpu(const BatchNormSiluArgs& args, int threads);
Status ddpm_step_cpu(const DdpmStepArgs& args, int threads);
Status noise_mse_cpu(const NoiseMseArgs& args, int threads);
Status noise_mse_backward_cpu(const NoiseMseArgs& args, int threads);

// stream is a cudaStream_t; every pointer is on that device.
Status normal_cuda(const FillArgs& args, int device, void* stream);
Status random_bits_cuda(const FillArgs& args, int device, void* stream);
Status q_sample_cuda(const QSampleArgs& args, int device, void* stream);
Status q_sample_backward_cuda(const QSampleBackwardArgs& args, int device, void* stream);
Status add_bias_temb_cuda(const AddBiasTembArgs& args, int device, void* stream);
Status add_bias_temb_backward_cuda(const AddBiasTembBackwardArgs& args, int device, void* stream);
Status group_norm_silu_cuda(const GroupNormSiluArgs& args, int device, void* stream);
Status group_norm_silu_backward_cuda(const GroupNormSiluArgs& args, int device, void* stream);
Status rms_norm_silu_cuda(const RmsNormSiluArgs& args, int device, void* stream);
Status rms_norm_silu_backward_cuda(const RmsNormSiluArgs& args, int device, void* stream);
Status batch_norm_silu_cuda(const BatchNormSiluArgs& args, int device, void* stream);
Status batch_norm_silu_backward_cuda(const BatchNormSiluArgs& args, int device, void* stream);
Status ddpm_step_cuda(const DdpmStepArgs& args, int device, void* stream);
Status noise_mse_cuda(const NoiseMseArgs& args, int device, void* stream);
Status noise_mse_backward_cuda(const NoiseMseArgs& args, int device, void* stream);

// What the CUDA half sees on this machine; every field is filled on a machine without a GPU too.
struct CudaInfo {
  int runtime_version = 0;  // CUDA runtime linked in
  int driver_version = 0;   // 0: no driver
  int device_count = 0;
  const char* error = nullptr;  // why no device can be used; null when one can
};
CudaInfo cuda_info();

}  // namespace ddpm_fast
