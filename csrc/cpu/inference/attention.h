// Attention as a layer of a fused network.
#pragma once

#include "layers.h"

namespace ddpm_fast::inference {

// softmax(scale q k^T) v for each head of each image, over its tokens and those of the memory, which are the same for
// every image and have no q. A source pixel is q, k and v, `channels` each, and heads are runs of channels / heads of
// them; the target has `channels`. Keys are taken in blocks, the memory's first: sums over the blocks so far
// are rescaled when a larger score appears (Milakov and Gimelshein 2018), so that what is needed of a core's cache does
// not grow with the tokens.
class Attention : public Layer {
 public:
  struct Sizes {
    int64_t n = 0, tokens = 0, channels = 0, heads = 1;
  };
  struct Memory {
    const float* keys = nullptr;  // [heads, tokens, channels / heads], the values likewise
    const float* values = nullptr;
    int64_t tokens = 0;  // 0: none
  };
  // channels are a multiple of heads, and of a head even; scale > 0.
  Attention(const Kernels& kernels, const Sizes& sizes, double scale, const Memory& memory, Place source, Place target);
  int64_t cut(int threads) override;
  void work(int64_t item, const Run& run, char* scratch) const override;
  int64_t scratch_bytes() const override;

 private:
  // Where an item's intermediate values lie, in bytes from the start of its scratch.
  struct Layout {
    int64_t keys, values, copies, scores, weights, sums, more, most, total, factor, end;
  };
  Layout layout() const;
  double cost(int64_t rows) const;
  // `count` keys or values: the first is at data, rows are `stride` elements apart.
  struct Rows {
    const char* data;
    int64_t stride, count;
  };
  Rows taken(int64_t first, int64_t count, const float* memory, const char* tokens, char* copies) const;
  void pack(const Rows& keys, const Rows& values, char* packed_keys, char* packed_values) const;
  void multiply(const void* a, int64_t a_stride, int64_t m, int64_t k, const char* b, int64_t columns, float* c) const;

  const Sizes sizes_;
  const float scale_;
  const Memory memory_;
  const Place source_, target_;
  const int64_t depth_, depth_k_, width_;  // channels of a head; as the k of a product; as its columns
  const int64_t blocks_, block_;           // of keys: how many, and those of each but the last
  const int64_t weights_stride_;
  const int64_t most_rows_;  // of an item
  int64_t parts_ = 1;        // items of a head of an image
};

}  // namespace ddpm_fast::inference
