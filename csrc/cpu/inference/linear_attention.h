// Linear attention as two layers of a fused network.
#pragma once

#include <memory>
#include <vector>

#include "layers.h"

namespace ddpm_fast::inference {

// out[p] = (sum over tokens j of K[j] v[j]^T)^T scale softmax(q[p]) for each head of each image (Shen et al. 2018,
// "Efficient Attention"), where K is the softmax of k over all tokens and those of the memory, channel by channel, and
// that of q runs over the head's channels. A source pixel is q, k and v, `channels` each; heads are runs of
// channels / heads of them; the target has `channels`.
//
// Tokens are cut into parts, each with its own largest k, sum and product of both matrices: so many items of the first
// layer, whose results the second merges. The memory is a part or more of its own, the same for all images.
struct LinearAttention {
  struct Memory {
    const float* keys = nullptr;  // [heads, channels / heads, tokens], the values likewise
    const float* values = nullptr;
    int64_t tokens = 0;  // 0: none
  };
  struct Sizes {
    int64_t n = 0, tokens = 0, channels = 0, heads = 1;
  };
  // Throws std::invalid_argument unless a head's channels are a multiple of 16, scale > 0 and so on.
  LinearAttention(const Sizes& sizes, double scale, const Memory& memory);

  // Where the parts of one head of an image, or of the memory, begin.
  float* image_parts(int64_t image, int64_t head) const;
  float* memory_parts(int64_t head) const;

  const Sizes sizes;
  const float scale;
  const Memory memory;
  const int64_t depth;                // channels of a head
  const int64_t parts, memory_count;  // of a head of an image, and of the memory
  const int64_t part_floats;

 private:
  std::vector<float> floats_;
  float* start_;  // on a cache line
};

// The first layer: an item is a part.
class LinearContext : public Layer {
 public:
  LinearContext(const Kernels& kernels, std::shared_ptr<LinearAttention> attention, Place source);
  int64_t cut(int threads) override;
  void work(int64_t item, const Run& run, char* scratch) const override;
  int64_t scratch_bytes() const override;

 private:
  struct Layout {
    int64_t weights, values, keys_of_memory, values_of_memory, end;
  };
  Layout layout() const;
  void copy_memory(const float* source, int64_t first, int64_t count, char* rows) const;

  const std::shared_ptr<LinearAttention> attention_;
  const Place source_;
  const int64_t weights_stride_;
};

// The second: an item is some tokens of a head of an image.
class LinearOutput : public Layer {
 public:
  LinearOutput(const Kernels& kernels, std::shared_ptr<LinearAttention> attention, Place source, Place target);
  int64_t cut(int threads) override;
  void work(int64_t item, const Run& run, char* scratch) const override;
  int64_t scratch_bytes() const override;

 private:
  struct Layout {
    int64_t parts, rows, context, weights, sums, products, end;
  };
  Layout layout() const;

  const std::shared_ptr<LinearAttention> attention_;
  const Place source_, target_;
  int64_t splits_ = 1;  // items of a head of an image
};

}  // namespace ddpm_fast::inference
