// One layer of each kind through Program with the AMX kernels on emulated tiles, next to the plain float32 kernels on
// the same numbers, on one thread and on three. Prints the relative errors that are too large; their number is the
// status.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "../../csrc/cpu/inference/attention.h"
#include "../../csrc/cpu/inference/isa.h"
#include "../../csrc/cpu/inference/linear_attention.h"
#include "../../csrc/cpu/inference/norm.h"
#include "../../csrc/cpu/inference/program.h"
#include "../../csrc/cpu/inference/rms_norm.h"

namespace ddpm_fast::inference {

// In place of isa.cpp, which would ask for the processor's own AMX.
const Kernels& float_kernels(const Kernels&) { return *kernels_plain(); }

}  // namespace ddpm_fast::inference

namespace {

using namespace ddpm_fast::inference;
using Floats = std::vector<float>;

Floats numbers(int64_t count, uint32_t seed) {
  Floats values(static_cast<size_t>(count));
  for (float& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(seed >> 24) / 128.0f - 1.0f;  // eight bits: bfloat16 holds them
  }
  return values;
}

// Activations as the kernels store them.
class Buffer {
 public:
  Buffer(const Kernels& kernels, int64_t count) : half_(kernels.half), bytes_(static_cast<size_t>(count) * width()) {}
  Buffer(const Kernels& kernels, const Floats& values) : Buffer(kernels, static_cast<int64_t>(values.size())) {
    for (size_t i = 0; i < values.size(); ++i)
      std::memcpy(&bytes_[i * width()], reinterpret_cast<const char*>(&values[i]) + 4 - width(), width());
  }
  void* data() { return bytes_.data(); }
  Floats floats() const {
    Floats values(bytes_.size() / width());
    for (size_t i = 0; i < values.size(); ++i)
      std::memcpy(reinterpret_cast<char*>(&values[i]) + 4 - width(), &bytes_[i * width()], width());
    return values;
  }

 private:
  size_t width() const { return half_ ? 2 : 4; }
  bool half_;
  std::vector<char> bytes_;
};

// What the layer makes of the numbers: its output and then the pooled output, if there is one.
Floats result(const Kernels& kernels, Kind kind, const Sizes& s, bool pool, int threads) {
  const int64_t pixels = s.n * s.h * s.w, columns = s.out,
                taps = kind == Kind::up || kind == Kind::down         ? 4
                       : kind == Kind::first7x7                       ? 49
                       : kind == Kind::output || kind == Kind::linear ? 1
                                                                      : 9;
  const Floats weight = numbers(taps * s.in * s.out, 1), bias = numbers(s.out, 2), x = numbers(pixels * s.in, 3);
  const Floats times = numbers(3 * columns, 4), labels = numbers(2 * columns, 5);
  const std::vector<int64_t> rows(static_cast<size_t>(s.n), 2), label_rows(static_cast<size_t>(s.n), 1);
  const Packing packing(kind, kernels, s.out, s.in);
  std::vector<char> packed(static_cast<size_t>(packing.bytes()) + 64);
  char* aligned = packed.data() + (64 - reinterpret_cast<uintptr_t>(packed.data()) % 64) % 64;
  pack(kind, kernels, s.out, s.in, weight.data(), aligned, threads);

  const bool larger = kind == Kind::up || kind == Kind::doubled,
             to_image = kind == Kind::output || kind == Kind::output3x3;
  Buffer source(kernels, x), target(kernels, pixels * (larger ? 4 : 1) / (kind == Kind::down ? 4 : 1) * s.out);
  Buffer pooled(kernels, pool ? pixels / 4 * s.out : 0);
  Floats image(static_cast<size_t>(pixels * s.out));
  const Place from = {source.data(), s.in}, to = {target.data(), s.out};
  const Place small = {pool ? pooled.data() : nullptr, s.out};
  Program program(columns);
  if (kind == Kind::up || kind == Kind::down || kind == Kind::linear)
    program.add(std::make_unique<Pixelwise>(kind, kernels, s, from, to, Place{}, aligned, bias.data()));
  else if (to_image)
    program.add(std::make_unique<Output>(kind, kernels, s, from, aligned, bias.data()));
  else
    program.add(
        std::make_unique<Convolution>(
            kind, kernels, s, Convolution::Ends{from, to, small, Place{}, true, 0}, aligned, bias.data()
        )
    );
  Run run;
  run.x = x.data();
  run.out = image.data();
  run.time_table = times.data();
  run.time_rows = rows.data();
  run.label_table = labels.data();
  run.label_rows = label_rows.data();
  program.run(run, threads);
  Floats values = to_image ? image : target.floats();
  const Floats more = pooled.floats();
  values.insert(values.end(), more.begin(), more.end());
  return values;
}

// GroupNorm with scale and shift, in a buffer with more channels.
Floats norm_result(const Kernels& kernels, const Sizes& s, int64_t groups, int threads) {
  const int64_t pixels = s.n * s.h * s.w, stride = s.in + 24, columns = 2 * s.in;
  const Floats weight = numbers(s.in, 1), beta = numbers(s.in, 2), x = numbers(pixels * stride, 3);
  const Floats times = numbers(3 * columns, 4), labels = numbers(2 * columns, 5);
  const std::vector<int64_t> rows(static_cast<size_t>(s.n), 2), label_rows(static_cast<size_t>(s.n), 1);
  Buffer source(kernels, x), target(kernels, pixels * s.in);
  Program program(columns);
  program.add(
      std::make_unique<GroupNorm>(
          kernels, s, groups, 1e-5, Place{source.data(), stride},
          GroupNorm::Affine{weight.data(), beta.data(), true, 0, s.in}, Place{target.data(), s.in}
      )
  );
  Run run;
  run.time_table = times.data();
  run.time_rows = rows.data();
  run.label_table = labels.data();
  run.label_rows = label_rows.data();
  program.run(run, threads);
  return target.floats();
}

// RMSNorm with scale and shift of another table row for each image, in place, with a residual.
Floats rms_result(const Kernels& kernels, const Sizes& s, int threads) {
  const int64_t pixels = s.n * s.h * s.w, columns = 2 * s.in;
  const Floats weight = numbers(s.in, 1), x = numbers(pixels * s.in, 3), more = numbers(pixels * s.in, 4);
  const Floats times = numbers(3 * columns, 5);
  std::vector<int64_t> rows(static_cast<size_t>(s.n));
  for (size_t i = 0; i < rows.size(); ++i)
    rows[i] = static_cast<int64_t>(i % 3);
  Buffer source(kernels, x), residual(kernels, more);
  const Place place = {source.data(), s.in};
  Program program(columns);
  program.add(
      std::make_unique<RmsNorm>(
          kernels, s, 1e-12, place, RmsNorm::Affine{weight.data(), true, 0, s.in}, Place{residual.data(), s.in}, place
      )
  );
  Run run;
  run.time_table = times.data();
  run.time_rows = rows.data();
  program.run(run, threads);
  return source.floats();
}

Floats attention_result(const Kernels& kernels, const Attention::Sizes& s, int64_t memory, int threads) {
  const int64_t pixels = s.n * s.tokens;
  Buffer source(kernels, numbers(pixels * 3 * s.channels, 1)), target(kernels, pixels * s.channels);
  const Floats keys = numbers(memory * s.channels, 2), values = numbers(memory * s.channels, 3);
  Program program(0);
  program.add(
      std::make_unique<Attention>(
          kernels, s, 0.5, Attention::Memory{keys.data(), values.data(), memory}, Place{source.data(), 3 * s.channels},
          Place{target.data(), s.channels}
      )
  );
  program.run(Run{}, threads);
  return target.floats();
}

Floats linear_result(const Kernels& kernels, const LinearAttention::Sizes& s, int64_t memory, int threads) {
  const int64_t pixels = s.n * s.tokens;
  Buffer source(kernels, numbers(pixels * 3 * s.channels, 1)), target(kernels, pixels * s.channels);
  const Floats keys = numbers(memory * s.channels, 2), values = numbers(memory * s.channels, 3);
  const auto attention =
      std::make_shared<LinearAttention>(s, 0.5, LinearAttention::Memory{keys.data(), values.data(), memory});
  const Place from = {source.data(), 3 * s.channels};
  Program program(0);
  program.add(std::make_unique<LinearContext>(kernels, attention, from));
  program.add(std::make_unique<LinearOutput>(kernels, attention, from, Place{target.data(), s.channels}));
  program.run(Run{}, threads);
  return target.floats();
}

// result(kernels, threads) of the plain kernels and of AMX.
template <typename Result>
int compare(const char* name, double most, const Result& result) {
  const Floats exact = result(*kernels_plain(), 1), got = result(*kernels_amx_bf16(), 1);
  double error = 0, size = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    error += std::pow(got[i] - exact[i], 2);
    size += std::pow(exact[i], 2);
  }
  error = std::sqrt(error / size);
  const bool same = got == result(*kernels_amx_bf16(), 3);
  std::printf("%s: relative error %.2g%s\n", name, error, same ? "" : "; other bits on three threads");
  return !(error <= most && same);
}

int check(const char* name, Kind kind, const Sizes& sizes, bool pool, double most) {
  return compare(name, most, [&](const Kernels& kernels, int threads) {
    return result(kernels, kind, sizes, pool, threads);
  });
}

int check_norm(const char* name, const Sizes& sizes, int64_t groups, double most) {
  return compare(name, most, [&](const Kernels& kernels, int threads) {
    return norm_result(kernels, sizes, groups, threads);
  });
}

int check_rms(const char* name, const Sizes& sizes, double most) {
  return compare(name, most, [&](const Kernels& kernels, int threads) { return rms_result(kernels, sizes, threads); });
}

int check_attention(const char* name, const Attention::Sizes& sizes, int64_t memory, double most) {
  return compare(name, most, [&](const Kernels& kernels, int threads) {
    return attention_result(kernels, sizes, memory, threads);
  });
}

int check_linear(const char* name, const LinearAttention::Sizes& sizes, int64_t memory, double most) {
  return compare(name, most, [&](const Kernels& kernels, int threads) {
    return linear_result(kernels, sizes, memory, threads);
  });
}

}  // namespace

int main() {
  // A stored bfloat16 is off by 2^-9 at most; Winograd's transformed inputs and weights are rounded as well.
  int wrong = check("winograd", Kind::winograd, {2, 8, 8, 48, 80}, true, 6e-3);
  wrong += check("winograd, odd size", Kind::winograd, {1, 5, 7, 32, 16}, false, 6e-3);
  wrong += check("winograd, many rows", Kind::winograd, {3, 16, 16, 16, 48}, true, 6e-3);
  wrong += check("window", Kind::window, {5, 2, 2, 64, 64}, true, 6e-3);
  wrong += check("direct", Kind::direct, {2, 6, 4, 48, 64}, true, 4e-3);
  wrong += check("direct, odd size", Kind::direct, {1, 3, 5, 16, 96}, false, 4e-3);
  wrong += check("first", Kind::first, {2, 8, 8, 3, 32}, true, 4e-3);
  wrong += check("up", Kind::up, {3, 4, 6, 48, 32}, false, 4e-3);
  wrong += check("output", Kind::output, {2, 8, 8, 32, 3}, false, 1e-5);
  wrong += check_norm("norm", {3, 5, 4, 96, 96}, 8, 4e-3);
  wrong += check_attention("attention", {2, 70, 64, 2}, 0, 4e-3);
  wrong += check_attention("attention, odd sizes, two blocks", {1, 261, 40, 1}, 0, 4e-3);
  wrong += check_attention("attention, few tokens", {3, 3, 16, 2}, 0, 4e-3);
  wrong += check("output 3x3", Kind::output3x3, {2, 8, 6, 32, 3}, false, 1e-5);
  wrong += check("doubled", Kind::doubled, {2, 5, 4, 48, 64}, false, 6e-3);
  wrong += check("strided", Kind::strided, {2, 8, 6, 48, 32}, false, 4e-3);
  wrong += check("linear", Kind::linear, {3, 4, 6, 48, 96}, false, 4e-3);
  wrong += check("down", Kind::down, {2, 8, 6, 48, 80}, false, 4e-3);
  wrong += check("first 7x7", Kind::first7x7, {2, 7, 9, 3, 48}, false, 4e-3);
  wrong += check_rms("RMSNorm", {3, 9, 5, 80, 80}, 4e-3);
  wrong += check_attention("attention with memory", {2, 265, 64, 2}, 5, 4e-3);
  wrong += check_linear("linear attention", {2, 150, 64, 2}, 4, 4e-3);
  wrong += check_linear("linear attention, odd sizes, two parts", {3, 259, 48, 3}, 3, 4e-3);
  wrong += check_linear("linear attention, wide heads, no memory", {1, 33, 160, 2}, 0, 4e-3);
  return wrong;
}
