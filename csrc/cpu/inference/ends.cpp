// Pixelwise products and the output layer.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "layers.h"

namespace ddpm_fast::inference {
namespace {

constexpr int64_t kPixels = 96;  // of a block
constexpr int64_t kItemsPerThread = 4;

int64_t divided_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

}  // namespace

Pixelwise::Pixelwise(
    Kind kind, const Kernels& kernels, const Sizes& sizes, Place source, Place target, Place residual,
    const void* packed, const float* bias
)
    : Product(kind, kernels, sizes, packed, bias), source_(source), target_(target), residual_(residual),
      total_(sizes.n * sizes.h * sizes.w / (kind == Kind::down ? 4 : 1)), blocks_(divided_up(total_, kPixels)) {
  if (kind != Kind::up && kind != Kind::down && kind != Kind::linear)
    throw std::invalid_argument("a pixelwise layer is of kind up, down or linear");
  if (kind == Kind::down && (sizes.h % 2 || sizes.w % 2))
    throw std::invalid_argument(
        "kind down needs an even height and width, got " + std::to_string(sizes.h) + "x" + std::to_string(sizes.w)
    );
}

int64_t Pixelwise::cut(int threads) {
  const int64_t wanted = threads > 1 ? divided_up(threads * kItemsPerThread, blocks_) : 1;
  splits_ = std::clamp<int64_t>(wanted, 1, static_cast<int64_t>(packing_.groups.size()));
  return blocks_ * splits_;
}

int64_t Pixelwise::scratch_bytes() const { return kPixels * kGroupPanels * kPanel * 4; }

void Pixelwise::work(int64_t item, const Run&, char* scratch) const {
  const int64_t block = item % blocks_, split = item / blocks_;
  const int64_t first = block * kPixels, m = std::min(kPixels, total_ - first);
  const int64_t groups = static_cast<int64_t>(packing_.groups.size()), last = groups * (split + 1) / splits_;
  void* out[kPixels];
  const void* residual[kPixels];
  const void* rows[4 * kPixels];
  Gemm g;
  g.m = m;
  if (kind_ == Kind::down) {
    g.rows = rows;
    g.segments = 4;
    for (int64_t j = 0; j < m; ++j) {
      const int64_t at = first + j, w = sizes_.w / 2, x = at % w, y = at / w;  // y counts on from image to image
      for (int64_t tap = 0; tap < 4; ++tap) {
        const int64_t pixel = (2 * y + tap / 2) * sizes_.w + 2 * x + tap % 2;
        rows[tap * m + j] = static_cast<const char*>(source_.data) + pixel * source_.stride * bytes_;
      }
    }
  } else {
    g.a = static_cast<const char*>(source_.data) + first * source_.stride * bytes_;
    g.a_stride = source_.stride;
  }
  g.k = packing_.k;
  g.c = reinterpret_cast<float*>(scratch);
  for (int64_t i = groups * split / splits_; i < last; ++i) {
    const Group& group = packing_.groups[static_cast<size_t>(i)];
    const int64_t width = group.panels * kPanel;
    g.panels = group.panels;
    g.b = weights(group);
    g.next = i + 1 < last ? weights(packing_.groups[static_cast<size_t>(i + 1)]) : nullptr;
    g.next_bytes = i + 1 < last ? packing_.positions * packing_.position_elements(group) * bytes_ : 0;
    kernels_.gemm(g);
    const auto store = [&](int64_t panel, int64_t panels, int64_t channel) {
      kernels_.store_rows(
          g.c + panel * kPanel, width, m, panels, bias_ + channel, residual_.data == nullptr ? nullptr : residual, out
      );
    };
    if (kind_ != Kind::up) {
      const int64_t channel = group.first_panel * kPanel;
      for (int64_t j = 0; j < m; ++j) {
        out[j] = static_cast<char*>(target_.data) + ((first + j) * target_.stride + channel) * bytes_;
        if (residual_.data != nullptr)
          residual[j] = static_cast<const char*>(residual_.data) + ((first + j) * residual_.stride + channel) * bytes_;
      }
      store(0, group.panels, channel);
      continue;
    }
    for (int64_t panel = 0; panel < group.panels;) {  // runs of panels that belong to one of the four pixels
      const int64_t column = (group.first_panel + panel) * kPanel;
      const int64_t q = column / sizes_.out, channel = column % sizes_.out;
      const int64_t panels = std::min(group.panels - panel, (sizes_.out - channel) / kPanel);
      for (int64_t j = 0; j < m; ++j) {
        const int64_t at = first + j, x = at % sizes_.w, y = at / sizes_.w % sizes_.h, n = at / sizes_.w / sizes_.h;
        const int64_t pixel = (n * 2 * sizes_.h + 2 * y + q / 2) * 2 * sizes_.w + 2 * x + q % 2;
        out[j] = static_cast<char*>(target_.data) + (pixel * target_.stride + channel) * bytes_;
      }
      store(panel, panels, channel);
      panel += panels;
    }
  }
}

Output::Output(
    Kind kind, const Kernels& kernels, const Sizes& sizes, Place source, const void* packed, const float* bias
)
    : Product(kind, kernels, sizes, packed, bias), source_(source), float_kernels_(float_kernels(kernels)),
      margin_(kind == Kind::output3x3 ? sizes.w + 1 : 0), blocks_(divided_up(sizes.n * sizes.h * sizes.w, kPixels)),
      zeros_(static_cast<size_t>(sizes.in)) {
  if (kind != Kind::output && kind != Kind::output3x3)
    throw std::invalid_argument("an output layer is of kind output or output3x3");
}

int64_t Output::cut(int) { return blocks_; }

int64_t Output::scratch_bytes() const {
  return ((kPixels + 2 * margin_) * sizes_.in + kPixels * kGroupPanels * kPanel) * 4 +
         9 * kPixels * static_cast<int64_t>(sizeof(void*));
}

void Output::work(int64_t item, const Run& run, char* scratch) const {
  const int64_t h = sizes_.h, w = sizes_.w, plane = h * w, total = sizes_.n * plane;
  const int64_t first = item * kPixels, m = std::min(kPixels, total - first);
  const int64_t from = std::max<int64_t>(first - margin_, 0), to = std::min(first + m + margin_, total);
  const void** rows = reinterpret_cast<const void**>(scratch);
  float* pixels = reinterpret_cast<float*>(scratch + 9 * kPixels * static_cast<int64_t>(sizeof(void*)));
  for (int64_t at = from; at < to; ++at)
    kernels_.to_float(
        static_cast<const char*>(source_.data) + at * source_.stride * bytes_, sizes_.in,
        pixels + (at - from) * sizes_.in
    );
  Gemm g;
  g.a = pixels;
  g.a_stride = sizes_.in;
  g.m = m;
  g.k = sizes_.in;
  g.c = pixels + (kPixels + 2 * margin_) * sizes_.in;
  if (kind_ == Kind::output3x3) {
    g.rows = rows;
    g.segments = 9;
    for (int64_t j = 0; j < m; ++j) {
      const int64_t at = first + j, y = at % plane / w, x = at % w;
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t dy = tap / 3 - 1, dx = tap % 3 - 1;
        const bool inside = y + dy >= 0 && y + dy < h && x + dx >= 0 && x + dx < w;
        rows[tap * m + j] = inside ? pixels + (at + dy * w + dx - from) * sizes_.in : zeros_.data();
      }
    }
  }
  for (const Group& group : packing_.groups) {
    const int64_t width = group.panels * kPanel, channel = group.first_panel * kPanel;
    g.panels = group.panels;
    g.b = weights(group);
    float_kernels_.gemm(g);
    for (int64_t c = 0; c < std::min(width, sizes_.out - channel); ++c)
      for (int64_t j = 0; j < m; ++j) {
        const int64_t n = (first + j) / plane, at = (first + j) % plane;
        run.result(n, sizes_.out * plane)[(channel + c) * plane + at] = g.c[j * width + c] + bias_[channel + c];
      }
  }
}

}  // namespace ddpm_fast::inference
