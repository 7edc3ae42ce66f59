// 3x3 convolutions, and the 7x7 one of an image: gather or transform the input of a block of windows, multiply, finish.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../../dispatch.h"
#include "isa.h"
#include "layers.h"

namespace ddpm_fast::inference {
namespace {

constexpr int64_t kAlign = 64;
constexpr int64_t kMostWindows = 144;
constexpr int64_t kTransformedBytes = 3 << 20;  // the transformed input of a block should stay close to its core
constexpr int64_t kSmallWeights = 768 << 10;    // weights that stay in a core's own cache between blocks
constexpr int64_t kLine = 64;                   // bytes of a cache line

int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int64_t divided_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Rows of the matrix product that one window makes.
int64_t rows_of_window(Kind kind) {
  const bool direct = kind == Kind::direct || kind == Kind::strided || kind == Kind::first || kind == Kind::first7x7;
  return direct ? 4 : 1;
}

// Pixels of the target along one side.
int64_t out_size(Kind kind, int64_t size, int64_t padding) {
  return kind == Kind::doubled ? 2 * size : kind == Kind::strided ? (size + padding) / 2 : size;
}

// Elements from one position to the next. A line more than needed: at a multiple of 4 KiB all positions of a window
// would fall into the same few sets of the cache.
int64_t spread(int64_t elements, int64_t bytes) { return elements + kLine / bytes; }

// What a row of windows side by side reads of the image for a 7x7 convolution: lines of so many elements, with one
// more than there are for the product that needs an even number, rounded up to whole cache lines.
constexpr int64_t kLines = 2 + 6;
int64_t line_elements(int64_t windows, int64_t channels) { return up_to((2 * windows + 6) * channels + 1, kLine); }

}  // namespace

Product::Product(Kind kind, const Kernels& kernels, const Sizes& sizes, const void* packed, const float* bias)
    : Layer(kernels), kind_(kind), sizes_(sizes), packing_(kind, kernels, sizes.out, sizes.in), packed_(packed),
      bias_(bias) {
  if (sizes.n < 1 || sizes.h < 1 || sizes.w < 1)
    throw std::invalid_argument(
        "n, h and w must be at least 1, got " + std::to_string(sizes.n) + ", " + std::to_string(sizes.h) + ", " +
        std::to_string(sizes.w)
    );
}

const void* Product::weights(const Group& group, int64_t position) const {
  const int64_t at = group.offset + position * packing_.position_elements(group);
  return static_cast<const char*>(packed_) + at * (packing_.half ? 2 : 4);
}

Convolution::Convolution(
    Kind kind, const Kernels& kernels, const Sizes& sizes, const Ends& ends, const void* packed, const float* bias
)
    : Product(kind, kernels, sizes, packed, bias), ends_(ends),
      transformed_(kind == Kind::winograd || kind == Kind::window || kind == Kind::doubled),
      pointers_(kind == Kind::direct || kind == Kind::strided || kind == Kind::first7x7),
      out_h_(out_size(kind, sizes.h, ends.padding)), out_w_(out_size(kind, sizes.w, ends.padding)),
      rows_((out_h_ + 1) / 2), columns_((out_w_ + 1) / 2), total_(sizes.n * rows_ * columns_),
      most_(
          transformed_
              ? std::clamp<int64_t>(kTransformedBytes / (packing_.positions * sizes.in * bytes_), 12, kMostWindows)
              : kMostWindows / 4
      ),
      zeros_(static_cast<size_t>(sizes.in * 4)) {
  if (kind == Kind::up || kind == Kind::down || kind == Kind::linear || kind == Kind::output || kind == Kind::output3x3)
    throw std::invalid_argument(
        "a convolution is of kind winograd, window, point, direct, strided, doubled, first or first7x7"
    );
  if (kind == Kind::strided && (out_h_ < 1 || out_w_ < 1))
    throw std::invalid_argument("kind strided without padding needs images of at least 2x2 pixels");
  if (kind == Kind::window && (sizes.h != 2 || sizes.w != 2))
    throw std::invalid_argument(
        "kind window is for images of 2x2 pixels, got " + std::to_string(sizes.h) + "x" + std::to_string(sizes.w)
    );
  if (kind == Kind::point && (sizes.h != 1 || sizes.w != 1))
    throw std::invalid_argument(
        "kind point is for images of one pixel, got " + std::to_string(sizes.h) + "x" + std::to_string(sizes.w)
    );
  if (ends.pooled.data != nullptr && (out_h_ % 2 || out_w_ % 2))
    throw std::invalid_argument(
        "pooling needs an even height and width, got " + std::to_string(out_h_) + "x" + std::to_string(out_w_)
    );
}

// Roughly the cycles of an item: the products, the gathering, the end, and the weights if they come from afar.
double Convolution::cost(int64_t windows, int64_t groups) const {
  const double rows = static_cast<double>(up_to(windows * rows_of_window(kind_), 6));
  const double columns = static_cast<double>(groups * kGroupPanels * kPanel);
  const double depth = static_cast<double>(packing_.positions * packing_.k);
  const double products = rows * depth * columns / (kernels_.half ? 32 : 16);
  const double ends = static_cast<double>(windows) * (static_cast<double>(sizes_.in) * 5 + columns * 8);
  const double weights = packing_.bytes() > kSmallWeights ? depth * columns * static_cast<double>(bytes_) / 10 : 0;
  return std::max(products, weights) + 0.1 * weights + ends + 500;
}

int64_t Convolution::cut(int threads) {
  const int64_t groups = static_cast<int64_t>(packing_.groups.size());
  double best = 0;
  for (int64_t windows = std::min(most_, total_), tried = 0; windows >= 1 && tried < 24; ++tried) {
    const int64_t blocks = divided_up(total_, windows), even = divided_up(total_, blocks);
    for (int64_t splits = 1; splits <= groups; ++splits) {
      if (groups % splits) continue;
      const int64_t rounds = divided_up(blocks * splits, threads);
      const double time = static_cast<double>(rounds) * cost(even, groups / splits);
      if (best == 0 || time < best) {
        best = time;
        windows_ = even, blocks_ = blocks, splits_ = splits;
      }
    }
    windows = std::min(even - 1, divided_up(total_, blocks + 1));
  }
  return blocks_ * splits_;
}

// Layout of the scratch memory: the gathered or transformed input, then the products of one group.
int64_t Convolution::scratch_bytes() const {
  const int64_t m = most_ * rows_of_window(kind_);
  const int64_t positions = transformed_ ? packing_.positions : 1;
  return up_to(gathered_bytes(most_), kAlign) + positions * spread(m * kGroupPanels * kPanel, 4) * 4;
}

int64_t Convolution::gathered_bytes(int64_t windows) const {
  const int64_t pointers = packing_.positions * 4 * windows * static_cast<int64_t>(sizeof(void*));
  // At the worst each window is the only one of its row of windows.
  if (kind_ == Kind::first7x7) return pointers + windows * kLines * line_elements(1, sizes_.in) * bytes_;
  if (pointers_) return pointers;
  if (kind_ == Kind::first) return 4 * windows * packing_.k * 4;
  return packing_.positions * spread(windows * sizes_.in, bytes_) * bytes_;
}

const char* Convolution::pixel(int64_t n, int64_t y, int64_t x) const {
  if (y < 0 || x < 0 || y >= sizes_.h || x >= sizes_.w) return zeros_.data();
  const int64_t at = ((n * sizes_.h + y) * sizes_.w + x) * ends_.source.stride;
  return static_cast<const char*>(ends_.source.data) + at * bytes_;
}

void Convolution::gather(int64_t first, int64_t count, char* gathered) const {
  const void* pixels[4 * (2 * kMostWindows + 2)];
  const int64_t stride = spread(count * sizes_.in, bytes_);
  for (int64_t i = 0; i < count;) {
    const int64_t n = (first + i) / (rows_ * columns_), window = (first + i) % (rows_ * columns_);
    const int64_t y = window / columns_ * 2, x = window % columns_ * 2;
    int64_t together = 1;
    if (pointers_) {
      const int64_t step = kind_ == Kind::strided ? 2 : 1;
      const void** rows = reinterpret_cast<const void**>(gathered) + 4 * i;
      for (int64_t tap = 0; tap < 9; ++tap, rows += 4 * count)
        for (int64_t q = 0; q < 4; ++q)
          rows[q] =
              pixel(n, step * (y + q / 2) + tap / 3 - ends_.padding, step * (x + q % 2) + tap % 3 - ends_.padding);
    } else if (kind_ == Kind::doubled) {
      together = std::min(count - i, columns_ - x / 2);
      const int64_t line = together + 2;
      for (int64_t q = 0; q < 3 * line; ++q)
        pixels[q] = pixel(n, y / 2 + q / line - 1, x / 2 + q % line - 1);
      kernels_.doubled_in(pixels, together, sizes_.in, gathered + i * sizes_.in * bytes_, stride);
    } else if (kind_ == Kind::winograd) {
      together = std::min(count - i, columns_ - x / 2);
      const int64_t line = 2 * together + 2;
      for (int64_t q = 0; q < 4 * line; ++q)
        pixels[q] = pixel(n, y + q / line - 1, x + q % line - 1);
      kernels_.winograd_in(pixels, together, sizes_.in, gathered + i * sizes_.in * bytes_, stride);
    } else {
      for (int64_t q = 0; q < 4; ++q)
        pixels[q] = pixel(n, q / 2, q % 2);
      kernels_.window_in(pixels, sizes_.in, gathered + i * sizes_.in * bytes_, stride);
    }
    i += together;
  }
}

// The 3x3 neighbourhoods of the image's pixels as rows (channel, ky, kx), zeros outside.
void Convolution::gather_image(const Run& run, int64_t first, int64_t count, float* rows) const {
  const int64_t h = sizes_.h, w = sizes_.w;
  for (int64_t i = 0; i < 4 * count; ++i) {
    const int64_t n = (first + i / 4) / (rows_ * columns_), window = (first + i / 4) % (rows_ * columns_);
    const int64_t y = window / columns_ * 2 + i % 4 / 2, x = window % columns_ * 2 + i % 2;
    const bool inside = y > 0 && x > 0 && y + 1 < h && x + 1 < w;
    const float* centre = run.image(n, sizes_.in * h * w) + y * w + x;
    for (int64_t c = 0; c < sizes_.in; ++c, centre += h * w)
      for (int64_t dy = -1; dy <= 1; ++dy, rows += 3)
        for (int64_t dx = -1; dx <= 1; ++dx)
          rows[dx + 1] =
              inside || (y + dy >= 0 && y + dy < h && x + dx >= 0 && x + dx < w) ? centre[dy * w + dx] : 0.0f;
  }
}

// For each window's pixels, seven rows of the product: of each line that the 7x7 neighbourhood touches, the seven
// pixels with all channels. Neighbours share the lines, whose memory follows that of the pointers.
void Convolution::gather_lines(const Run& run, int64_t first, int64_t count, char* gathered) const {
  const int64_t c = sizes_.in;
  const void** rows = reinterpret_cast<const void**>(gathered);
  char* lines = gathered + packing_.positions * 4 * count * static_cast<int64_t>(sizeof(void*));
  for (int64_t i = 0, together; i < count; i += together) {
    const int64_t n = (first + i) / (rows_ * columns_), window = (first + i) % (rows_ * columns_);
    const int64_t y = window / columns_ * 2, x = window % columns_ * 2;
    together = std::min(count - i, columns_ - x / 2);
    const int64_t bytes = line_elements(together, c) * bytes_;
    for (int64_t line = 0; line < kLines; ++line)
      copy_line(run.image(n, c * sizes_.h * sizes_.w), y + line - 3, x - 3, 2 * together + 6, lines + line * bytes);
    for (int64_t ky = 0; ky < 7; ++ky)
      for (int64_t q = 0; q < 4 * together; ++q)
        rows[(ky * count + i) * 4 + q] = lines + (ky + q % 4 / 2) * bytes + (q / 4 * 2 + q % 2) * c * bytes_;
    lines += kLines * bytes;
  }
}

// `pixels` of line y of an image from x on as activations, channels last, and one zero; zeros outside of the image.
void Convolution::copy_line(const float* image, int64_t y, int64_t x, int64_t pixels, char* line) const {
  const int64_t h = sizes_.h, w = sizes_.w, c = sizes_.in;
  std::memset(line, 0, static_cast<size_t>((pixels * c + 1) * bytes_));
  if (y < 0 || y >= h) return;
  const int64_t from = std::max<int64_t>(-x, 0), to = std::min(pixels, w - x);
  for (int64_t channel = 0; channel < c; ++channel) {
    const float* source = image + (channel * h + y) * w + x;
    if (kernels_.half)
      for (int64_t i = from; i < to; ++i)
        reinterpret_cast<uint16_t*>(line)[i * c + channel] = bf16_from_float(source[i]);
    else
      for (int64_t i = from; i < to; ++i)
        reinterpret_cast<float*>(line)[i * c + channel] = source[i];
  }
}

void Convolution::finish(const Run& run, int64_t first, int64_t count, const Group& group, const float* m) const {
  const int64_t width = group.panels * kPanel, channel = group.first_panel * kPanel;
  const bool direct = rows_of_window(kind_) == 4;
  Finish f;
  // A point's other three pixels lie outside of the image; they are computed from its own and not stored.
  f.stride = direct ? width : kind_ == Kind::point ? 0 : spread(count * width, 4);
  f.panels = group.panels;
  f.bias = bias_ + channel;
  f.silu = ends_.silu;
  const auto run_it = kind_ == Kind::winograd  ? kernels_.winograd_finish
                      : kind_ == Kind::window  ? kernels_.window_finish
                      : kind_ == Kind::doubled ? kernels_.doubled_finish
                                               : kernels_.direct_finish;
  char* target = static_cast<char*>(ends_.target.data);
  const char* residual = static_cast<const char*>(ends_.residual.data);
  char* pooled = static_cast<char*>(ends_.pooled.data);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = (first + i) / (rows_ * columns_), window = (first + i) % (rows_ * columns_);
    const int64_t y = window / columns_ * 2, x = window % columns_ * 2;
    f.m = m + i * width * (direct ? 4 : 1);
    if (ends_.temb_column >= 0) {
      f.temb = run.times(n) + ends_.temb_column + channel;
      f.label = run.labels(n);
      if (f.label != nullptr) f.label += ends_.temb_column + channel;
    }
    for (int64_t q = 0; q < 4; ++q) {
      const int64_t row = y + q / 2, column = x + q % 2;
      const int64_t at = (n * out_h_ + row) * out_w_ + column;
      const bool inside = row < out_h_ && column < out_w_;
      f.out[q] = inside ? target + (at * ends_.target.stride + channel) * bytes_ : nullptr;
      if (residual != nullptr && inside) f.residual[q] = residual + (at * ends_.residual.stride + channel) * bytes_;
    }
    if (pooled != nullptr) f.pooled = pooled + ((first + i) * ends_.pooled.stride + channel) * bytes_;
    run_it(f);
  }
}

void Convolution::work(int64_t item, const Run& run, char* scratch) const {
  const int64_t block = item % blocks_, split = item / blocks_;
  const int64_t first = block * windows_, count = std::min(windows_, total_ - first);
  const int64_t groups = static_cast<int64_t>(packing_.groups.size());
  const int64_t m = count * rows_of_window(kind_);
  char* gathered = scratch;
  float* products = reinterpret_cast<float*>(scratch + up_to(gathered_bytes(most_), kAlign));

  Gemm g;
  g.m = m;
  g.k = packing_.k;
  g.a_stride = packing_.k;
  if (kind_ == Kind::first) {
    gather_image(run, first, count, reinterpret_cast<float*>(gathered));
  } else if (kind_ == Kind::first7x7) {
    gather_lines(run, first, count, gathered);
  } else if (kind_ == Kind::point) {
    g.a_stride = ends_.source.stride;
  } else {
    gather(first, count, gathered);
  }
  if (pointers_) {
    g.rows = reinterpret_cast<const void* const*>(gathered);
    g.segments = packing_.positions;
  }
  const auto multiply = kind_ == Kind::first ? float_kernels(kernels_).gemm : kernels_.gemm;
  const int64_t positions = transformed_ ? packing_.positions : 1;
  const int64_t last = groups * (split + 1) / splits_;
  for (int64_t i = groups * split / splits_; i < last; ++i) {
    const Group& group = packing_.groups[static_cast<size_t>(i)];
    g.panels = group.panels;
    const int64_t bytes = packing_.position_elements(group) * (packing_.half ? 2 : 4) * g.segments;
    for (int64_t position = 0; position < positions; ++position) {
      g.a = kind_ == Kind::point ? pixel(first, 0, 0) : gathered + position * spread(m * sizes_.in, bytes_) * bytes_;
      g.b = weights(group, position);
      // Positions and groups follow one another in memory.
      const bool end = i + 1 == last && position + 1 == positions;
      g.next = end ? nullptr : static_cast<const char*>(g.b) + bytes;
      g.next_bytes = end ? 0 : bytes;
      g.c = products + position * spread(m * group.panels * kPanel, 4);
      multiply(g);
    }
    finish(run, first, count, group, products);
  }
}

}  // namespace ddpm_fast::inference
