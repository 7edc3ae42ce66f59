// The part of ddpm_fast._C that runs a fused U-Net on a CPU (cpu/inference).
//
// Addresses come in as integers and are kept by a Program; Python keeps the memory alive.
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "cpu/inference/attention.h"
#include "cpu/inference/isa.h"
#include "cpu/inference/linear_attention.h"
#include "cpu/inference/norm.h"
#include "cpu/inference/program.h"
#include "cpu/inference/rms_norm.h"

namespace py = pybind11;

namespace ddpm_fast {
namespace {

using namespace inference;

// (name, "bf16" or "f32") of every instruction set that can be used here, best first
py::list inference_isas() {
  py::list result;
  for (const Kernels* kernels : usable_kernels())
    result.append(py::make_tuple(kernels->name, kernels->half ? "bf16" : "f32"));
  return result;
}

int64_t packed_bytes(const std::string& kind, const std::string& isa, int64_t out_channels, int64_t in_channels) {
  return Packing(kind_named(kind), kernels_named(isa), out_channels, in_channels).bytes();
}

void pack_weights(
    const std::string& kind, const std::string& isa, int64_t out_channels, int64_t in_channels, Address weight,
    Address packed, int threads
) {
  const Kind known = kind_named(kind);
  const Kernels& kernels = kernels_named(isa);
  py::gil_scoped_release unlocked;
  pack(known, kernels, out_channels, in_channels, pointer<float>(weight), pointer<void>(packed), threads);
}

Place place(Address data, int64_t stride) { return {pointer<void>(data), stride}; }

void program_conv(
    Program& program, const std::string& kind, const std::string& isa, int64_t n, int64_t h, int64_t w, int64_t in,
    int64_t out, Address source, int64_t source_stride, Address packed, Address bias, bool silu, int64_t temb_column,
    int64_t padding, Address target, int64_t target_stride, Address pooled, int64_t pooled_stride, Address residual,
    int64_t residual_stride
) {
  const Convolution::Ends ends{
      place(source, source_stride),
      place(target, target_stride),
      place(pooled, pooled_stride),
      place(residual, residual_stride),
      silu,
      temb_column,
      padding,
  };
  program.add(
      std::make_unique<Convolution>(
          kind_named(kind), kernels_named(isa), Sizes{n, h, w, in, out}, ends, pointer<void>(packed),
          pointer<float>(bias)
      )
  );
}

void program_pixelwise(
    Program& program, const std::string& kind, const std::string& isa, int64_t n, int64_t h, int64_t w, int64_t in,
    int64_t out, Address source, int64_t source_stride, Address packed, Address bias, Address target,
    int64_t target_stride, Address residual, int64_t residual_stride
) {
  program.add(
      std::make_unique<Pixelwise>(
          kind_named(kind), kernels_named(isa), Sizes{n, h, w, in, out}, place(source, source_stride),
          place(target, target_stride), place(residual, residual_stride), pointer<void>(packed), pointer<float>(bias)
      )
  );
}

void program_output(
    Program& program, const std::string& kind, const std::string& isa, int64_t n, int64_t h, int64_t w, int64_t in,
    int64_t out, Address source, int64_t source_stride, Address packed, Address bias
) {
  program.add(
      std::make_unique<Output>(
          kind_named(kind), kernels_named(isa), Sizes{n, h, w, in, out}, place(source, source_stride),
          pointer<void>(packed), pointer<float>(bias)
      )
  );
}

void program_norm(
    Program& program, const std::string& isa, int64_t n, int64_t h, int64_t w, int64_t channels, int64_t groups,
    double eps, Address source, int64_t source_stride, Address weight, Address beta, bool silu, int64_t scale_column,
    int64_t shift_column, Address target, int64_t target_stride
) {
  const GroupNorm::Affine affine{pointer<float>(weight), pointer<float>(beta), silu, scale_column, shift_column};
  program.add(
      std::make_unique<GroupNorm>(
          kernels_named(isa), Sizes{n, h, w, channels, channels}, groups, eps,
          Place{pointer<void>(source), source_stride}, affine, Place{pointer<void>(target), target_stride}
      )
  );
}

void program_rms_norm(
    Program& program, const std::string& isa, int64_t n, int64_t h, int64_t w, int64_t channels, double eps,
    Address source, int64_t source_stride, Address weight, bool silu, int64_t scale_column, int64_t shift_column,
    Address residual, int64_t residual_stride, Address target, int64_t target_stride
) {
  program.add(
      std::make_unique<RmsNorm>(
          kernels_named(isa), Sizes{n, h, w, channels, channels}, eps, place(source, source_stride),
          RmsNorm::Affine{pointer<float>(weight), silu, scale_column, shift_column}, place(residual, residual_stride),
          place(target, target_stride)
      )
  );
}

void program_attention(
    Program& program, const std::string& isa, int64_t n, int64_t tokens, int64_t channels, int64_t heads, double scale,
    Address memory_keys, Address memory_values, int64_t memory_tokens, Address source, int64_t source_stride,
    Address target, int64_t target_stride
) {
  program.add(
      std::make_unique<Attention>(
          kernels_named(isa), Attention::Sizes{n, tokens, channels, heads}, scale,
          Attention::Memory{pointer<float>(memory_keys), pointer<float>(memory_values), memory_tokens},
          place(source, source_stride), place(target, target_stride)
      )
  );
}

// Two layers of the program.
void program_linear_attention(
    Program& program, const std::string& isa, int64_t n, int64_t tokens, int64_t channels, int64_t heads, double scale,
    Address memory_keys, Address memory_values, int64_t memory_tokens, Address source, int64_t source_stride,
    Address target, int64_t target_stride
) {
  const Kernels& kernels = kernels_named(isa);
  const LinearAttention::Memory memory{pointer<float>(memory_keys), pointer<float>(memory_values), memory_tokens};
  const auto attention =
      std::make_shared<LinearAttention>(LinearAttention::Sizes{n, tokens, channels, heads}, scale, memory);
  const Place from = place(source, source_stride);
  program.add(std::make_unique<LinearContext>(kernels, attention, from));
  program.add(std::make_unique<LinearOutput>(kernels, attention, from, place(target, target_stride)));
}

Run run_of(
    Address x, Address out, Address time_table, Address time_rows, int64_t time_rows_stride, Address label_table,
    Address label_rows
) {
  Run run;
  run.x = pointer<float>(x);
  run.out = pointer<float>(out);
  run.time_table = pointer<float>(time_table);
  run.time_rows = pointer<int64_t>(time_rows);
  run.time_rows_stride = time_rows_stride;
  run.label_table = pointer<float>(label_table);
  run.label_rows = pointer<int64_t>(label_rows);
  return run;
}

void program_run(
    Program& program, Address x, Address out, Address time_table, Address time_rows, Address label_table,
    Address label_rows, int threads
) {
  const Run run = run_of(x, out, time_table, time_rows, 1, label_table, label_rows);
  py::gil_scoped_release unlocked;
  program.run(run, threads);
}

// A whole sampling step: m = network(x) at time_table[row], x = ddpm_step(x, m, row), row += 1. One row for all images.
void program_step(
    Program& program, Address x, Address m, Address time_table, Address label_table, Address label_rows, int64_t n,
    int64_t channels, int64_t inner, Address table, Address t_of_row, int64_t steps, Address row, Address rng,
    Address x0_out, Address bad_row, int threads
) {
  const Run run = run_of(x, m, time_table, row, 0, label_table, label_rows);
  DdpmStepArgs update;
  update.shape = {n, channels, inner, false};
  update.x = pointer<float>(x);
  update.m = array(m, static_cast<int>(DType::f32));
  update.table = pointer<float>(table);
  update.t_of_row = pointer<int32_t>(t_of_row);
  update.steps = steps;
  update.row = pointer<int64_t>(row);
  update.noise.rng = pointer<int64_t>(rng);
  update.x0_out = pointer<float>(x0_out);
  update.bad_row = pointer<int32_t>(bad_row);
  Status status;
  {
    py::gil_scoped_release unlocked;
    program.run(run, threads);
    status = ddpm_step_cpu(update, threads);
    ++*pointer<int64_t>(row);
  }
  if (!status.ok()) throw std::runtime_error(status.message);
}

}  // namespace

void bind_inference(py::module_& m) {
  m.def("inference_isas", &inference_isas);
  m.def("packed_bytes", &packed_bytes);
  m.def("pack", &pack_weights);
  py::class_<Program>(m, "Program")
      .def(py::init<int64_t>())
      .def("from_image", &Program::from_image)
      .def("conv", &program_conv)
      .def("pixelwise", &program_pixelwise)
      .def("output", &program_output)
      .def("norm", &program_norm)
      .def("rms_norm", &program_rms_norm)
      .def("attention", &program_attention)
      .def("linear_attention", &program_linear_attention)
      .def("run", &program_run)
      .def("step", &program_step)
      .def("seconds", [](const Program& program) { return program.seconds(); });
}

}  // namespace ddpm_fast
