// RMSNorm: an item is a run of pixels of one image, all of whose channels have the same weight and shift.
#include "rms_norm.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace ddpm_fast::inference {
namespace {

constexpr int64_t kMostElements = 32 << 10;  // of an item: it should leave its core's cache to its neighbours
constexpr int64_t kLeastElements = 4 << 10;  // worth the weights that an item makes and the trouble of fetching it

int64_t divided_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

const Sizes& checked(const Sizes& sizes, double eps) {
  if (sizes.n < 1 || sizes.h < 1 || sizes.w < 1)
    throw std::invalid_argument(
        "n, h and w must be at least 1, got " + std::to_string(sizes.n) + ", " + std::to_string(sizes.h) + ", " +
        std::to_string(sizes.w)
    );
  if (sizes.in < 1 || sizes.in % kPanel)
    throw std::invalid_argument("channels must be a multiple of 16, got " + std::to_string(sizes.in));
  if (!(eps >= 0)) throw std::invalid_argument("eps must not be negative, got " + std::to_string(eps));
  return sizes;
}

}  // namespace

RmsNorm::RmsNorm(
    const Kernels& kernels, const Sizes& sizes, double eps, Place source, const Affine& affine, Place residual,
    Place target
)
    : Layer(kernels), sizes_(checked(sizes, eps)), pixels_(sizes.h * sizes.w), eps_(static_cast<float>(eps)),
      source_(source), residual_(residual), target_(target), affine_(affine) {
  if ((affine.scale_column < 0) != (affine.shift_column < 0))
    throw std::invalid_argument(
        "scale_column and shift_column must both be columns or both -1, got " + std::to_string(affine.scale_column) +
        " and " + std::to_string(affine.shift_column)
    );
}

int64_t RmsNorm::cut(int threads) {
  const int64_t elements = pixels_ * sizes_.in, wanted = divided_up(2 * threads, sizes_.n);
  const int64_t least = divided_up(elements, kMostElements), most = divided_up(elements, kLeastElements);
  parts_ = std::min(std::clamp(wanted, least, most), pixels_);
  return sizes_.n * parts_;
}

int64_t RmsNorm::scratch_bytes() const { return 2 * sizes_.in * 4; }

void RmsNorm::work(int64_t item, const Run& run, char* scratch) const {
  const int64_t image = item / parts_, part = item % parts_;
  const int64_t first = pixels_ * part / parts_, at = image * pixels_ + first;
  PixelNorm n;
  n.pixels = pixels_ * (part + 1) / parts_ - first;
  n.panels = sizes_.in / kPanel;
  n.eps = eps_;
  n.silu = affine_.silu;
  n.source = static_cast<const char*>(source_.data) + at * source_.stride * bytes_;
  n.source_stride = source_.stride;
  n.target = static_cast<char*>(target_.data) + at * target_.stride * bytes_;
  n.target_stride = target_.stride;
  if (residual_.data != nullptr) n.residual = static_cast<const char*>(residual_.data) + at * residual_.stride * bytes_;
  n.residual_stride = residual_.stride;
  n.scale = affine_.weight;
  if (affine_.scale_column >= 0) {
    float* scale = reinterpret_cast<float*>(scratch);
    float* shift = scale + sizes_.in;
    const float* time = run.times(image);
    const float* label = run.labels(image);
    for (int64_t c = 0; c < sizes_.in; ++c) {
      const int64_t a = affine_.scale_column + c, b = affine_.shift_column + c;
      scale[c] = affine_.weight[c] * (1.0f + (label == nullptr ? time[a] : time[a] + label[a]));
      shift[c] = label == nullptr ? time[b] : time[b] + label[b];
    }
    n.scale = scale;
    n.shift = shift;
  }
  kernels_.normalise_pixels(n);
}

}  // namespace ddpm_fast::inference
