// The layers of a fused U-Net on a CPU. Each is cut into items that any thread may take in any order; what an output
// element is made of never depends on the cut.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "pack.h"

namespace ddpm_fast::inference {

// What differs from call to call.
struct Run {
  const float* x = nullptr;  // the images, float32 (n, c, h, w)
  float* out = nullptr;      // like x
  const float* time_table = nullptr;
  const int64_t* time_rows = nullptr;  // [n], or with stride 0 one for all images
  int64_t time_rows_stride = 1;
  const float* label_table = nullptr;  // optional
  const int64_t* label_rows = nullptr;
  int64_t columns = 0;  // of both tables

  int64_t first = 0;  // of the images: what a layer calls image 0

  // An image of `elements` floats, where its result goes, and its row of the time table and of the label table: null
  // where there is none.
  const float* image(int64_t index, int64_t elements) const { return x + (first + index) * elements; }
  float* result(int64_t index, int64_t elements) const { return out + (first + index) * elements; }
  const float* times(int64_t index) const {
    return time_table + time_rows[(first + index) * time_rows_stride] * columns;
  }
  const float* labels(int64_t index) const {
    return label_table == nullptr ? nullptr : label_table + label_rows[first + index] * columns;
  }
};

// Pixels (n, y, x) of a channels-last buffer with `stride` channels each; data points at the slice's first channel.
struct Place {
  void* data = nullptr;
  int64_t stride = 0;
};

struct Sizes {
  int64_t n = 0, h = 0, w = 0, in = 0, out = 0;
};

class Layer {
 public:
  explicit Layer(const Kernels& kernels) : kernels_(kernels), bytes_(kernels.half ? 2 : 4) {}
  virtual ~Layer() = default;
  // Cuts the layer for so many threads and returns the number of items.
  virtual int64_t cut(int threads) = 0;
  virtual void work(int64_t item, const Run& run, char* scratch) const = 0;
  virtual int64_t scratch_bytes() const = 0;
  const Kernels& kernels() const { return kernels_; }

 protected:
  const Kernels& kernels_;
  const int64_t bytes_;  // of one activation
};

// A layer that multiplies by packed weights.
class Product : public Layer {
 protected:
  Product(Kind kind, const Kernels& kernels, const Sizes& sizes, const void* packed, const float* bias);
  const void* weights(const Group& group, int64_t position = 0) const;

  const Kind kind_;
  const Sizes sizes_;
  const Packing packing_;
  const void* const packed_;
  const float* const bias_;
};

// 3x3 convolution by 2x2 windows of output pixels, with padding 1: winograd, window (images of 2x2), point (images of
// one pixel, which meets the middle tap only), direct, or first (which reads run.x). first7x7: 7x7 with padding 3 of
// run.x. doubled: of the image with every
// pixel doubled in both directions. strided: with stride 2, padding 1 all around or, with padding 0, at the far ends
// only.
class Convolution : public Product {
 public:
  struct Ends {
    Place source, target;
    Place pooled;    // data null: no pooling
    Place residual;  // added to the target; data null: nothing
    bool silu = false;
    int64_t temb_column = -1;  // negative: no time embedding
    int64_t padding = 1;
  };
  Convolution(
      Kind kind, const Kernels& kernels, const Sizes& sizes, const Ends& ends, const void* packed, const float* bias
  );
  int64_t cut(int threads) override;
  void work(int64_t item, const Run& run, char* scratch) const override;
  int64_t scratch_bytes() const override;

 private:
  double cost(int64_t windows, int64_t groups) const;
  int64_t gathered_bytes(int64_t windows) const;
  void gather(int64_t first, int64_t count, char* gathered) const;
  void gather_image(const Run& run, int64_t first, int64_t count, float* rows) const;
  void gather_lines(const Run& run, int64_t first, int64_t count, char* gathered) const;
  void copy_line(const float* image, int64_t y, int64_t x, int64_t pixels, char* line) const;
  void finish(const Run& run, int64_t first, int64_t count, const Group& group, const float* m) const;
  const char* pixel(int64_t n, int64_t y, int64_t x) const;

  const Ends ends_;
  const bool transformed_;                // winograd, window, doubled: a product per position
  const bool pointers_;                   // direct, strided: rows of the source itself; first7x7: of lines
  const int64_t out_h_, out_w_;           // pixels of the target
  const int64_t rows_, columns_, total_;  // windows of an image, and of all
  const int64_t most_;                    // windows of a block at the most
  std::vector<char> zeros_;               // a pixel outside of the image
  int64_t windows_ = 0, blocks_ = 0;      // windows of a block, and blocks
  int64_t splits_ = 1;                    // parts of the output channels
};

// Products of pixels as they are. up: transposed 2x2 convolution with stride 2, each input pixel gives four output
// pixels. down: 2x2 convolution with stride 2; h and w even. linear: 1x1 convolution, residual (optional, may be the
// target) added.
class Pixelwise : public Product {
 public:
  Pixelwise(
      Kind kind, const Kernels& kernels, const Sizes& sizes, Place source, Place target, Place residual,
      const void* packed, const float* bias
  );
  int64_t cut(int threads) override;
  void work(int64_t item, const Run& run, char* scratch) const override;
  int64_t scratch_bytes() const override;

 private:
  const Place source_, target_, residual_;
  const int64_t total_, blocks_;  // rows of the product: pixels of the source, or those of the target that down makes
  int64_t splits_ = 1;
};

// 1x1 or 3x3 convolution to the image, in float32: (n, out, h, w) at run.out.
class Output : public Product {
 public:
  Output(Kind kind, const Kernels& kernels, const Sizes& sizes, Place source, const void* packed, const float* bias);
  int64_t cut(int threads) override;
  void work(int64_t item, const Run& run, char* scratch) const override;
  int64_t scratch_bytes() const override;

 private:
  const Place source_;
  const Kernels& float_kernels_;
  const int64_t margin_;  // pixels before and after a block that it reads, too
  const int64_t blocks_;
  const std::vector<float> zeros_;  // a pixel outside of the image
};

}  // namespace ddpm_fast::inference
