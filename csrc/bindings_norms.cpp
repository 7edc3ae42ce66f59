// The part of the Python module ddpm_fast._C that is about the norms; see bindings.cpp.
#include "bindings.h"

namespace ddpm_fast {
namespace {

// What forward and backward pass alike.
GroupNormSiluArgs group_norm_silu_args(
    const Shape& shape, int64_t groups, const Array& h, const Array& bias, const Array& temb, const Array& weight,
    bool weight_per_sample, const Array& beta, bool beta_per_sample, bool silu, Address mean, Address rstd,
    int64_t parts, Address workspace
) {
  GroupNormSiluArgs args;
  args.shape = shape;
  args.groups = groups;
  args.h = h;
  args.bias = bias;
  args.temb = temb;
  args.weight = weight;
  args.weight_per_sample = weight_per_sample;
  args.beta = beta;
  args.beta_per_sample = beta_per_sample;
  args.silu = silu;
  args.mean = pointer<float>(mean);
  args.rstd = pointer<float>(rstd);
  args.parts = parts;
  args.workspace = pointer<float>(workspace);
  return args;
}

void group_norm_silu(
    int device, Address stream, int64_t n, int64_t channels, int64_t inner, bool channels_last, int64_t groups,
    Address h, int h_dtype, Address bias, int bias_dtype, Address temb, int temb_dtype, Address weight,
    int weight_dtype, bool weight_per_sample, Address beta, int beta_dtype, bool beta_per_sample, bool silu,
    Address mean, Address rstd, int64_t parts, Address workspace, float eps, Address y
) {
  GroupNormSiluArgs args = group_norm_silu_args(
      shape_of(n, channels, inner, channels_last), groups, array(h, h_dtype), array(bias, bias_dtype),
      array(temb, temb_dtype), array(weight, weight_dtype), weight_per_sample, array(beta, beta_dtype), beta_per_sample,
      silu, mean, rstd, parts, workspace
  );
  args.eps = eps;
  args.y = array(y, h_dtype);
  launch<GroupNormSiluArgs>(args, device, stream, DDPM_FAST_LAUNCHERS(group_norm_silu));
}

void group_norm_silu_backward(
    int device, Address stream, int64_t n, int64_t channels, int64_t inner, bool channels_last, int64_t groups,
    Address h, int h_dtype, Address bias, int bias_dtype, Address temb, int temb_dtype, Address weight,
    int weight_dtype, bool weight_per_sample, Address beta, int beta_dtype, bool beta_per_sample, bool silu,
    Address mean, Address rstd, int64_t parts, Address workspace, Address g, int g_dtype, Address g_h, Address g_sum,
    Address d_weight, Address d_beta
) {
  GroupNormSiluArgs args = group_norm_silu_args(
      shape_of(n, channels, inner, channels_last), groups, array(h, h_dtype), array(bias, bias_dtype),
      array(temb, temb_dtype), array(weight, weight_dtype), weight_per_sample, array(beta, beta_dtype), beta_per_sample,
      silu, mean, rstd, parts, workspace
  );
  args.g = array(g, g_dtype);
  args.g_h = array(g_h, h_dtype);
  args.g_sum = pointer<float>(g_sum);
  args.d_weight = pointer<float>(d_weight);
  args.d_beta = pointer<float>(d_beta);
  launch<GroupNormSiluArgs>(args, device, stream, DDPM_FAST_LAUNCHERS(group_norm_silu_backward));
}

// What forward and backward pass alike.
RmsNormSiluArgs rms_norm_silu_args(
    const Shape& shape, const Array& h, const Array& weight, bool weight_per_sample, const Array& beta,
    bool beta_per_sample, float eps, bool silu
) {
  RmsNormSiluArgs args;
  args.shape = shape;
  args.h = h;
  args.weight = weight;
  args.weight_per_sample = weight_per_sample;
  args.beta = beta;
  args.beta_per_sample = beta_per_sample;
  args.eps = eps;
  args.silu = silu;
  return args;
}

void rms_norm_silu(
    int device, Address stream, int64_t n, int64_t channels, int64_t inner, bool channels_last, Address h, int h_dtype,
    Address weight, int weight_dtype, bool weight_per_sample, Address beta, int beta_dtype, bool beta_per_sample,
    float eps, bool silu, Address residual, Address y
) {
  RmsNormSiluArgs args = rms_norm_silu_args(
      shape_of(n, channels, inner, channels_last), array(h, h_dtype), array(weight, weight_dtype), weight_per_sample,
      array(beta, beta_dtype), beta_per_sample, eps, silu
  );
  args.residual = array(residual, h_dtype);
  args.y = array(y, h_dtype);
  launch<RmsNormSiluArgs>(args, device, stream, DDPM_FAST_LAUNCHERS(rms_norm_silu));
}

void rms_norm_silu_backward(
    int device, Address stream, int64_t n, int64_t channels, int64_t inner, bool channels_last, Address h, int h_dtype,
    Address weight, int weight_dtype, bool weight_per_sample, Address beta, int beta_dtype, bool beta_per_sample,
    float eps, bool silu, Address g, int g_dtype, Address g_h, Address d_weight, Address d_beta, int64_t parts,
    Address workspace
) {
  RmsNormSiluArgs args = rms_norm_silu_args(
      shape_of(n, channels, inner, channels_last), array(h, h_dtype), array(weight, weight_dtype), weight_per_sample,
      array(beta, beta_dtype), beta_per_sample, eps, silu
  );
  args.g = array(g, g_dtype);
  args.g_h = array(g_h, h_dtype);
  args.d_weight = pointer<float>(d_weight);
  args.d_beta = pointer<float>(d_beta);
  args.parts = parts;
  args.workspace = pointer<float>(workspace);
  launch<RmsNormSiluArgs>(args, device, stream, DDPM_FAST_LAUNCHERS(rms_norm_silu_backward));
}

// What forward and backward pass alike.
BatchNormSiluArgs batch_norm_silu_args(
    const Shape& shape, const Array& h, const Array& weight, const Array& bias, Address mean, Address var,
    bool of_batch, float eps, bool silu, int64_t parts, Address workspace
) {
  BatchNormSiluArgs args;
  args.shape = shape;
  args.h = h;
  args.weight = weight;
  args.bias = bias;
  args.mean = pointer<float>(mean);
  args.var = pointer<float>(var);
  args.of_batch = of_batch;
  args.eps = eps;
  args.silu = silu;
  args.parts = parts;
  args.workspace = pointer<float>(workspace);
  return args;
}

void batch_norm_silu(
    int device, Address stream, int64_t n, int64_t channels, int64_t inner, bool channels_last, Address h, int h_dtype,
    Address weight, int weight_dtype, Address bias, int bias_dtype, Address mean, Address var, bool of_batch, float eps,
    bool silu, int64_t parts, Address workspace, Address temb, int temb_dtype, Address y
) {
  BatchNormSiluArgs args = batch_norm_silu_args(
      shape_of(n, channels, inner, channels_last), array(h, h_dtype), array(weight, weight_dtype),
      array(bias, bias_dtype), mean, var, of_batch, eps, silu, parts, workspace
  );
  args.temb = array(temb, temb_dtype);
  args.y = array(y, h_dtype);
  launch<BatchNormSiluArgs>(args, device, stream, DDPM_FAST_LAUNCHERS(batch_norm_silu));
}

void batch_norm_silu_backward(
    int device, Address stream, int64_t n, int64_t channels, int64_t inner, bool channels_last, Address h, int h_dtype,
    Address weight, int weight_dtype, Address bias, int bias_dtype, Address mean, Address var, bool of_batch, float eps,
    bool silu, int64_t parts, Address workspace, Address g, int g_dtype, Address g_h, Address g_temb, Address d_weight,
    Address d_bias
) {
  BatchNormSiluArgs args = batch_norm_silu_args(
      shape_of(n, channels, inner, channels_last), array(h, h_dtype), array(weight, weight_dtype),
      array(bias, bias_dtype), mean, var, of_batch, eps, silu, parts, workspace
  );
  args.g = array(g, g_dtype);
  args.g_h = array(g_h, h_dtype);
  args.g_temb = pointer<float>(g_temb);
  args.d_weight = pointer<float>(d_weight);
  args.d_bias = pointer<float>(d_bias);
  launch<BatchNormSiluArgs>(args, device, stream, DDPM_FAST_LAUNCHERS(batch_norm_silu_backward));
}

}  // namespace

void bind_norms(pybind11::module_& m) {
  m.def("group_norm_silu", &group_norm_silu);
  m.def("group_norm_silu_backward", &group_norm_silu_backward);
  m.def("rms_norm_silu", &rms_norm_silu);
  m.def("rms_norm_silu_backward", &rms_norm_silu_backward);
  m.def("batch_norm_silu", &batch_norm_silu);
  m.def("batch_norm_silu_backward", &batch_norm_silu_backward);
}

}  // namespace ddpm_fast
