// GroupNorm as a layer of a fused network.
#pragma once

#include "layers.h"

namespace ddpm_fast::inference {

// y = act(weight'[c] (x - mean) / sqrt(variance + eps) + beta'[c]), mean and biased variance over the pixels and the
// channels of a group; act: SiLU or identity. weight' and beta' are weight and beta, with columns set
// weight (1 + scale) and beta (1 + scale) + shift, where scale and shift are columns of the time table (and the label
// table, added to it) from scale_column and shift_column on. The target may be the source.
class GroupNorm : public Layer {
 public:
  struct Affine {
    const float* weight = nullptr;  // [channels]
    const float* beta = nullptr;    // [channels]
    bool silu = false;
    int64_t scale_column = -1, shift_column = -1;  // both negative: none
  };
  // sizes.in: the channels, a multiple of 16 and of groups.
  GroupNorm(
      const Kernels& kernels, const Sizes& sizes, int64_t groups, double eps, Place source, const Affine& affine,
      Place target
  );
  int64_t cut(int threads) override;
  void work(int64_t item, const Run& run, char* scratch) const override;
  int64_t scratch_bytes() const override;

 private:
  // What the kernels need of every channel of an item.
  struct Channels {
    double *sum, *square;
    float *shift, *block_sum, *block_square;
    float *scale, *offset;
  };
  Channels channels(char* scratch) const;
  void measure(const char* source, int64_t panels, const Channels& c) const;
  void combine(const Run& run, int64_t image, int64_t first, int64_t count, const Channels& c) const;

  const Sizes sizes_;
  const int64_t pixels_, group_channels_;
  const double eps_;
  const Place source_, target_;
  const Affine affine_;
  const int64_t unit_panels_, units_;  // the fewest panels that begin and end with a group, and how many of those
  int64_t splits_ = 1;                 // items of an image
};

}  // namespace ddpm_fast::inference
