// Transposed convolutions and the output layer.
#include <algorithm>
#include <stdexcept>

#include "isa.h"
#include "layers.h"

namespace ddpm_fast::inference {
namespace {

constexpr int64_t kPixels = 96;  // of a block
constexpr int64_t kItemsPerThread = 4;

int64_t divided_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

}  // namespace

Upsampling::Upsampling(
    const Kernels& kernels, const Sizes& sizes, Place source, Place target, const void* packed, const float* bias
)
    : Product(Kind::up, kernels, sizes, packed, bias), source_(source), target_(target),
      blocks_(divided_up(sizes.n * sizes.h * sizes.w, kPixels)) {}

int64_t Upsampling::cut(int threads) {
  const int64_t wanted = threads > 1 ? divided_up(threads * kItemsPerThread, blocks_) : 1;
  splits_ = std::clamp<int64_t>(wanted, 1, static_cast<int64_t>(packing_.groups.size()));
  return blocks_ * splits_;
}

int64_t Upsampling::scratch_bytes() const { return kPixels * kGroupPanels * kPanel * 4; }

void Upsampling::work(int64_t item, const Run&, char* scratch) const {
  const int64_t total = sizes_.n * sizes_.h * sizes_.w;
  const int64_t block = item % blocks_, split = item / blocks_;
  const int64_t first = block * kPixels, m = std::min(kPixels, total - first);
  const int64_t groups = static_cast<int64_t>(packing_.groups.size()), last = groups * (split + 1) / splits_;
  void* out[kPixels];
  Gemm g;
  g.a = static_cast<const char*>(source_.data) + first * source_.stride * bytes_;
  g.a_stride = source_.stride;
  g.m = m;
  g.k = packing_.k;
  g.c = reinterpret_cast<float*>(scratch);
  for (int64_t i = groups * split / splits_; i < last; ++i) {
    const Group& group = packing_.groups[static_cast<size_t>(i)];
    const int64_t width = group.panels * kPanel;
    g.panels = group.panels;
    g.b = weights(group);
    g.next = i + 1 < last ? weights(packing_.groups[static_cast<size_t>(i + 1)]) : nullptr;
    g.next_bytes = i + 1 < last ? packing_.position_elements(group) * bytes_ : 0;
    kernels_.gemm(g);
    for (int64_t panel = 0; panel < group.panels;) {  // runs of panels that belong to one of the four pixels
      const int64_t column = (group.first_panel + panel) * kPanel;
      const int64_t q = column / sizes_.out, channel = column % sizes_.out;
      const int64_t run = std::min(group.panels - panel, (sizes_.out - channel) / kPanel);
      for (int64_t j = 0; j < m; ++j) {
        const int64_t at = first + j, x = at % sizes_.w, y = at / sizes_.w % sizes_.h, n = at / sizes_.w / sizes_.h;
        const int64_t pixel = (n * 2 * sizes_.h + 2 * y + q / 2) * 2 * sizes_.w + 2 * x + q % 2;
        out[j] = static_cast<char*>(target_.data) + (pixel * target_.stride + channel) * bytes_;
      }
      kernels_.store_rows(g.c + panel * kPanel, width, m, run, bias_ + channel, out);
      panel += run;
    }
  }
}

Output::Output(const Kernels& kernels, const Sizes& sizes, Place source, const void* packed, const float* bias)
    : Product(Kind::output, kernels, sizes, packed, bias), source_(source), float_kernels_(float_kernels(kernels)),
      blocks_(divided_up(sizes.n * sizes.h * sizes.w, kPixels)) {}

int64_t Output::cut(int) { return blocks_; }

int64_t Output::scratch_bytes() const { return kPixels * (sizes_.in + kGroupPanels * kPanel) * 4; }

void Output::work(int64_t item, const Run& run, char* scratch) const {
  const int64_t plane = sizes_.h * sizes_.w, total = sizes_.n * plane;
  const int64_t first = item * kPixels, m = std::min(kPixels, total - first);
  float* rows = reinterpret_cast<float*>(scratch);
  for (int64_t j = 0; j < m; ++j)
    kernels_.to_float(
        static_cast<const char*>(source_.data) + (first + j) * source_.stride * bytes_, sizes_.in, rows + j * sizes_.in
    );
  Gemm g;
  g.a = rows;
  g.a_stride = sizes_.in;
  g.m = m;
  g.k = sizes_.in;
  g.c = rows + kPixels * sizes_.in;
  for (const Group& group : packing_.groups) {
    const int64_t width = group.panels * kPanel, channel = group.first_panel * kPanel;
    g.panels = group.panels;
    g.b = weights(group);
    float_kernels_.gemm(g);
    for (int64_t c = 0; c < std::min(width, sizes_.out - channel); ++c)
      for (int64_t j = 0; j < m; ++j) {
        const int64_t n = (first + j) / plane, at = (first + j) % plane;
        run.out[(n * sizes_.out + channel + c) * plane + at] = g.c[j * width + c] + bias_[channel + c];
      }
  }
}

}  // namespace ddpm_fast::inference
