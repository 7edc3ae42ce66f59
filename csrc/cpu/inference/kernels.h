// What one instruction set provides to the fused U-Net: a table of plain functions. No STL here or in the files that
// fill the tables: they are compiled for instruction sets that this machine may lack, and an inline function of theirs
// must never be the copy that the linker keeps for everybody.
//
// Activations are channels last, bfloat16 in the `half` tables and float32 in the others; sums are float32 in both.
// Weights are packed for `gemm` (pack.h): panels of 16 output channels, up to 4 panels side by side in a group.
#pragma once

#include <cstdint>

namespace ddpm_fast::inference {

constexpr int64_t kPanel = 16;
constexpr int64_t kGroupPanels = 4;

// c[i, j] = sum over segments s and k of a_s[i, k] b[s, k, j], for m rows and 16 * panels columns.
// Row i of segment s starts at rows[s * m + i] or, where rows is null, at a + i * a_stride (then one segment).
struct Gemm {
  const void* const* rows = nullptr;
  const void* a = nullptr;
  int64_t a_stride = 0;  // elements
  int64_t m = 0;
  int64_t segments = 1;
  int64_t k = 0;               // elements in a row of one segment; even in half tables
  const void* b = nullptr;     // one packed group
  const void* next = nullptr;  // what will be b next, to be fetched into the cache meanwhile; optional
  int64_t next_bytes = 0;
  int64_t panels = 0;  // 1 .. kGroupPanels
  float* c = nullptr;  // rows of 16 * panels floats
};

// The end of a layer for one 2x2 window of output pixels and one group of channels.
struct Finish {
  const float* m = nullptr;  // position p of the transformed products at m + p * stride
  int64_t stride = 0;
  int64_t panels = 0;
  const float* bias = nullptr;
  const float* temb = nullptr;   // added after the activation; optional
  const float* label = nullptr;  // added to temb; optional
  bool silu = false;
  void* out[4] = {};  // pixels (0,0) (0,1) (1,0) (1,1) of the window; null: outside of the image
  // Activations to be added at the very end, to those pixels; may be where they go. [0] null: none.
  const void* residual[4] = {};
  void* pooled = nullptr;  // where their maximum goes; optional
};

// Sums over pixels of x - shift and of its square, for every channel of `panels` panels.
struct Moments {
  const void* source = nullptr;
  int64_t stride = 0;  // elements from pixel to pixel
  int64_t pixels = 0, panels = 0;
  const float* shift = nullptr;
  float* sum = nullptr;
  float* square = nullptr;
};

// y = act(scale (x - shift) + offset), channel by channel; y may be x.
struct Normalise {
  const void* source = nullptr;
  void* target = nullptr;
  int64_t source_stride = 0, target_stride = 0;
  int64_t pixels = 0, panels = 0;
  const float* shift = nullptr;
  const float* scale = nullptr;
  const float* offset = nullptr;
  bool silu = false;
};

// y = act(x / max(|x|, eps) scale + shift) + residual, where |x| is the root of the sum of squares over a pixel's
// channels; y may be x or the residual.
struct PixelNorm {
  const void* source = nullptr;
  void* target = nullptr;
  const void* residual = nullptr;  // optional
  int64_t source_stride = 0, target_stride = 0, residual_stride = 0;
  int64_t pixels = 0, panels = 0;
  float eps = 0;
  const float* scale = nullptr;
  const float* shift = nullptr;  // optional
  bool silu = false;
};

// Rows in memory as the b of a Gemm: b[k, j] is source[j][k] (pack_columns) or source[k][j] (pack_rows), and zero where
// the source has no such row or element.
struct Operand {
  const void* source = nullptr;
  int64_t stride = 0;        // elements from row to row
  int64_t count = 0;         // rows
  int64_t length = 0;        // elements of a row
  int64_t k = 0, width = 0;  // of b: a multiple of k_multiple, a multiple of 16
  void* b = nullptr;
};

// weights[i, j] = e^(scale (scores[i, j] - most[i])) for m rows, where most is the row's largest score so far; sum gets
// the row's sum of them added after being multiplied, as everything summed so far has to be, by factor.
struct Softmax {
  float* scores = nullptr;  // [m][64] for 64 columns after the other, the last of them filled up to 16; overwritten
  int64_t m = 0, columns = 0;
  float scale = 0;
  float* most = nullptr;    // [m], before the first columns the lowest float
  float* sum = nullptr;     // [m], before the first columns 0
  float* factor = nullptr;  // [m]
  void* weights = nullptr;  // activations; zeros from `columns` to k, which is a multiple of k_multiple
  int64_t stride = 0;       // elements from row to row; a multiple of 16 not below columns
  int64_t k = 0;
};

// weights[d, j] = e^(keys[j][d] - most[d]) for `count` keys, where most is the largest of its channel: a softmax over
// keys that is still to be divided by sum. The rows of the result are channels, as the a of a product over keys.
struct KeyWeights {
  const void* keys = nullptr;
  int64_t key_stride = 0, count = 0, depth = 0;  // depth: a multiple of 16
  void* weights = nullptr;                       // rows weights_stride apart, zeros from `count` to k
  int64_t weights_stride = 0, k = 0;             // k: a multiple of k_multiple, and weights_stride one of 32 not below
  float* most = nullptr;                         // [depth]
  float* sum = nullptr;                          // [depth]
};

// Parts of one softmax over keys, times values. A part is most [depth], sum [depth] and then, for column groups of up
// to 64 one after the other, weights times values [depth][width]. target[d][e] = scale sum over parts / their sum.
struct Merge {
  const float* const* parts = nullptr;
  int64_t count = 0, depth = 0;
  int64_t first = 0, width = 0;  // the columns of the group
  float scale = 0;
  void* target = nullptr;  // activations [depth][width]
};

// weights[i, j] = e^(rows[i][j] - the row's largest), and their sum, for m rows of `depth`.
struct RowWeights {
  const void* rows = nullptr;
  int64_t row_stride = 0, m = 0, depth = 0;  // depth: a multiple of 16
  void* weights = nullptr;                   // activations [m][depth]
  float* sum = nullptr;                      // [m]
};

struct Kernels {
  const char* name;
  bool half;
  int64_t k_multiple;  // packed weights have zeros up to this multiple of rows in each segment

  // Around any number of gemm calls of one thread, for units that have to be set up; null where there are none.
  void (*begin)();
  void (*end)();
  void (*gemm)(const Gemm&);
  // v[p * stride + i * channels + c] for the 16 positions of `count` windows side by side, and for the 9 of one image
  // of 2x2. Pixels: 4 lines of 2 * count + 2, of which each window reads 4x4; or the image's four.
  void (*winograd_in)(const void* const* pixels, int64_t count, int64_t channels, void* v, int64_t stride);
  void (*window_in)(const void* const* pixels, int64_t channels, void* v, int64_t stride);
  // The 9 positions of `count` pixels side by side that are to be doubled before a convolution; 3 lines of count + 2.
  void (*doubled_in)(const void* const* pixels, int64_t count, int64_t channels, void* v, int64_t stride);
  // What undoes them, and for `direct` the four sums as they are; then bias, activation, time embedding, stores.
  void (*winograd_finish)(const Finish&);
  void (*window_finish)(const Finish&);
  void (*doubled_finish)(const Finish&);
  void (*direct_finish)(const Finish&);
  // out[i][j] = c[i, j] + bias[j] + residual[i][j] for m rows of c, `panels` panels of each, rows `c_stride` floats
  // apart. residual: null for none; it may be out.
  void (*store_rows)(
      const float* c, int64_t c_stride, int64_t m, int64_t panels, const float* bias, const void* const* residual,
      void* const* out
  );
  void (*to_float)(const void* source, int64_t count, float* target);
  void (*moments)(const Moments&);
  void (*normalise)(const Normalise&);
  void (*normalise_pixels)(const PixelNorm&);
  void (*pack_columns)(const Operand&);
  void (*pack_rows)(const Operand&);
  void (*softmax)(const Softmax&);
  void (*key_weights)(const KeyWeights&);
  void (*merge)(const Merge&);
  void (*row_weights)(const RowWeights&);
  // sums[i, j] = sums[i, j] factor[i] + more[i, j] for m rows of width floats.
  void (*rescale_add)(float* sums, const float* more, const float* factor, int64_t m, int64_t width);
  // out[i][j] = sums[i, j] / divisor[i] for m rows and the first `columns` of their width; out's rows are stride apart.
  void (*store_divided)(
      const float* sums, int64_t width, int64_t m, int64_t columns, const float* divisor, void* out, int64_t stride
  );
};

// Null where the compiler could not build it.
const Kernels* kernels_plain();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_amx_bf16();

}  // namespace ddpm_fast::inference
