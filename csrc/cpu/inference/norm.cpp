// GroupNorm: an item is an image and a run of panels that begins and ends with a group. It is read twice, the second
// time from the core's own cache if it fits.
#include "norm.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

namespace ddpm_fast::inference {
namespace {

constexpr int64_t kBlock = 256;            // pixels whose sums are made in float32 before they are added in float64
constexpr int64_t kItemBytes = 512 << 10;  // of activations, that a core finds in its own cache when it comes back
constexpr double kItemCost = 1 << 10;      // in elements: what an item costs however small it is
constexpr double kFromAfar = 1.3;          // reading a second time from a cache that all cores share
constexpr double kHalfLines = 1.2;         // reading every second half of a line of the cache
constexpr int64_t kLine = 64;

int64_t divided_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

const Sizes& checked(const Sizes& sizes, int64_t groups) {
  if (sizes.n < 1 || sizes.h < 1 || sizes.w < 1)
    throw std::invalid_argument(
        "n, h and w must be at least 1, got " + std::to_string(sizes.n) + ", " + std::to_string(sizes.h) + ", " +
        std::to_string(sizes.w)
    );
  if (sizes.in < 1 || sizes.in % kPanel)
    throw std::invalid_argument("channels must be a multiple of 16, got " + std::to_string(sizes.in));
  if (groups < 1 || sizes.in % groups)
    throw std::invalid_argument(
        "channels must be a multiple of groups, got " + std::to_string(sizes.in) + " channels and " +
        std::to_string(groups) + " groups"
    );
  return sizes;
}

}  // namespace

GroupNorm::GroupNorm(
    const Kernels& kernels, const Sizes& sizes, int64_t groups, double eps, Place source, const Affine& affine,
    Place target
)
    : Layer(kernels), sizes_(checked(sizes, groups)), pixels_(sizes.h * sizes.w), group_channels_(sizes.in / groups),
      eps_(eps), source_(source), target_(target), affine_(affine),
      unit_panels_(std::lcm(group_channels_, kPanel) / kPanel), units_(sizes.in / kPanel / unit_panels_) {
  if ((affine.scale_column < 0) != (affine.shift_column < 0))
    throw std::invalid_argument(
        "scale_column and shift_column must both be columns or both -1, got " + std::to_string(affine.scale_column) +
        " and " + std::to_string(affine.shift_column)
    );
}

// The fewest items of an image that keep all threads busy and let a core find an item again in its cache.
int64_t GroupNorm::cut(int threads) {
  double best = 0;
  for (int64_t splits = 1; splits <= units_; ++splits) {
    const int64_t panels = divided_up(units_, splits) * unit_panels_, bytes = panels * kPanel * bytes_;
    double time = static_cast<double>(pixels_ * panels * kPanel);
    if (pixels_ * bytes > kItemBytes) time *= kFromAfar;
    if (splits > 1 && bytes % kLine) time *= kHalfLines;
    time = (time + kItemCost) * static_cast<double>(divided_up(sizes_.n * splits, threads));
    if (best == 0 || time < best) {
      best = time;
      splits_ = splits;
    }
  }
  return sizes_.n * splits_;
}

int64_t GroupNorm::scratch_bytes() const { return sizes_.in * (2 * 8 + 5 * 4); }

GroupNorm::Channels GroupNorm::channels(char* scratch) const {
  const int64_t c = sizes_.in;
  double* wide = reinterpret_cast<double*>(scratch);
  float* narrow = reinterpret_cast<float*>(wide + 2 * c);
  return {wide, wide + c, narrow, narrow + c, narrow + 2 * c, narrow + 3 * c, narrow + 4 * c};
}

// Sums of x - shift and of its square over all pixels. The shift is the channel's first pixel, so that a mean far from
// zero cancels before anything is squared.
void GroupNorm::measure(const char* source, int64_t panels, const Channels& c) const {
  const int64_t count = panels * kPanel;
  kernels_.to_float(source, count, c.shift);
  std::fill_n(c.sum, count, 0.0);
  std::fill_n(c.square, count, 0.0);
  Moments m;
  m.stride = source_.stride;
  m.panels = panels;
  m.shift = c.shift;
  m.sum = c.block_sum;
  m.square = c.block_square;
  for (int64_t pixel = 0; pixel < pixels_; pixel += kBlock) {
    m.source = source + pixel * source_.stride * bytes_;
    m.pixels = std::min(kBlock, pixels_ - pixel);
    kernels_.moments(m);
    for (int64_t i = 0; i < count; ++i) {
      c.sum[i] += static_cast<double>(c.block_sum[i]);
      c.square[i] += static_cast<double>(c.block_square[i]);
    }
  }
}

// scale and offset of y = scale (x - shift) + offset, for `count` channels from `first` on, which are whole groups.
void GroupNorm::combine(const Run& run, int64_t image, int64_t first, int64_t count, const Channels& c) const {
  const float* time = nullptr;
  const float* label = nullptr;
  if (affine_.scale_column >= 0) {
    time = run.times(image);
    label = run.labels(image);
  }
  const auto column = [&](int64_t at) {
    return static_cast<double>(time[at]) + (label == nullptr ? 0.0 : static_cast<double>(label[at]));
  };
  const double pixels = static_cast<double>(pixels_), part = 1 / pixels;  // multiplying is sooner done than dividing
  const double channels = static_cast<double>(group_channels_);
  for (int64_t begin = 0; begin < count; begin += group_channels_) {
    const int64_t end = begin + group_channels_;
    const double origin = static_cast<double>(c.shift[begin]);  // means of channels are added up from here
    double mean = 0, squares = 0;
    for (int64_t i = begin; i < end; ++i)
      mean += static_cast<double>(c.shift[i]) - origin + c.sum[i] * part;
    mean /= channels;
    for (int64_t i = begin; i < end; ++i) {
      const double inside = c.sum[i] * part, apart = static_cast<double>(c.shift[i]) - origin + inside - mean;
      squares += c.square[i] - inside * c.sum[i] + pixels * apart * apart;
    }
    const double rstd = 1 / std::sqrt(std::max(squares / (channels * pixels), 0.0) + eps_);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t channel = first + i;
      double weight = static_cast<double>(affine_.weight[channel]), beta = static_cast<double>(affine_.beta[channel]);
      if (time != nullptr) {
        const double factor = 1 + column(affine_.scale_column + channel);
        weight *= factor;
        beta = beta * factor + column(affine_.shift_column + channel);
      }
      c.scale[i] = static_cast<float>(weight * rstd);
      c.offset[i] = static_cast<float>(beta + (static_cast<double>(c.shift[i]) - origin - mean) * weight * rstd);
    }
  }
}

void GroupNorm::work(int64_t item, const Run& run, char* scratch) const {
  const int64_t image = item / splits_, split = item % splits_;
  const int64_t first = units_ * split / splits_ * unit_panels_;
  const int64_t panels = units_ * (split + 1) / splits_ * unit_panels_ - first;
  const Channels c = channels(scratch);
  const int64_t source_at = image * pixels_ * source_.stride + first * kPanel;
  const int64_t target_at = image * pixels_ * target_.stride + first * kPanel;
  const char* source = static_cast<const char*>(source_.data) + source_at * bytes_;
  char* target = static_cast<char*>(target_.data) + target_at * bytes_;
  measure(source, panels, c);
  combine(run, image, first * kPanel, panels * kPanel, c);
  Normalise n;
  n.source_stride = source_.stride;
  n.target_stride = target_.stride;
  n.panels = panels;
  n.shift = c.shift;
  n.scale = c.scale;
  n.offset = c.offset;
  n.silu = affine_.silu;
  for (int64_t pixel = 0; pixel < pixels_; pixel += kBlock) {
    n.source = source + pixel * source_.stride * bytes_;
    n.target = target + pixel * target_.stride * bytes_;
    n.pixels = std::min(kBlock, pixels_ - pixel);
    kernels_.normalise(n);
  }
}

}  // namespace ddpm_fast::inference
