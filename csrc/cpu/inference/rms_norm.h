// RMSNorm as a layer of a fused network.
#pragma once

#include "layers.h"

namespace ddpm_fast::inference {

// y = act(weight'[c] x / max(|x|, eps) + shift[c]) + residual, |x| the root of the sum of squares over a pixel's
// channels (Zhang and Sennrich 2019, with sqrt(channels) in the weight); act: SiLU or identity. weight' is weight, with
// columns set weight (1 + scale), where scale and shift are columns of the time table (and the label table, added to
// it) from scale_column and shift_column on. The target may be the source or the residual.
class RmsNorm : public Layer {
 public:
  struct Affine {
    const float* weight = nullptr;  // [channels]
    bool silu = false;
    int64_t scale_column = -1, shift_column = -1;  // both negative: none
  };
  // sizes.in: the channels, a multiple of 16. residual: data null for none.
  RmsNorm(
      const Kernels& kernels, const Sizes& sizes, double eps, Place source, const Affine& affine, Place residual,
      Place target
  );
  int64_t cut(int threads) override;
  void work(int64_t item, const Run& run, char* scratch) const override;
  int64_t scratch_bytes() const override;

 private:
  const Sizes sizes_;
  const int64_t pixels_;  // of an image
  const float eps_;
  const Place source_, residual_, target_;
  const Affine affine_;
  int64_t parts_ = 1;  // items of an image
};

}  // namespace ddpm_fast::inference
