// Attention: an item is some rows of a head of an image. Keys and values are packed block by block as if they were
// weights, and gemm does both products.
#include "attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "../../dispatch.h"

namespace ddpm_fast::inference {
namespace {

constexpr int64_t kAlign = 64;
constexpr int64_t kBlockTokens = 256;  // keys and values that are packed at a time; a panel more if some are memory
constexpr int64_t kItemRows = 256;     // rows that packed keys and values are used for at the most
constexpr int64_t kRows = 64;          // of a product; scores stay close to the core
constexpr int64_t kGroup = kGroupPanels * kPanel;

int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int64_t divided_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

const Attention::Sizes& checked(const Attention::Sizes& sizes, double scale, const Attention::Memory& memory) {
  if (sizes.n < 1 || sizes.tokens < 1)
    throw std::invalid_argument(
        "n and tokens must be at least 1, got " + std::to_string(sizes.n) + " and " + std::to_string(sizes.tokens)
    );
  if (sizes.heads < 1 || sizes.channels < 1 || sizes.channels % (2 * sizes.heads))
    throw std::invalid_argument(
        "channels must be a multiple of twice the heads, got " + std::to_string(sizes.channels) + " channels and " +
        std::to_string(sizes.heads) + " heads"
    );
  if (!(scale > 0)) throw std::invalid_argument("scale must be positive, got " + std::to_string(scale));
  if (memory.tokens < 0 || (memory.tokens > 0 && (memory.keys == nullptr || memory.values == nullptr)))
    throw std::invalid_argument(
        "memory needs keys, values and a number of tokens, got " + std::to_string(memory.tokens) + " tokens"
    );
  return sizes;
}

}  // namespace

Attention::Attention(
    const Kernels& kernels, const Sizes& sizes, double scale, const Memory& memory, Place source, Place target
)
    : Layer(kernels), sizes_(checked(sizes, scale, memory)), scale_(static_cast<float>(scale)), memory_(memory),
      source_(source), target_(target), depth_(sizes.channels / sizes.heads),
      depth_k_(up_to(depth_, kernels.k_multiple)), width_(up_to(depth_, kPanel)),
      blocks_(divided_up(sizes.tokens + std::max<int64_t>(memory.tokens - kPanel, 0), kBlockTokens)),
      block_(std::min(up_to(divided_up(sizes.tokens + memory.tokens, blocks_), kPanel), sizes.tokens + memory.tokens)),
      weights_stride_(up_to(up_to(block_, kPanel), kernels.k_multiple) + kAlign / bytes_),
      most_rows_(std::min(sizes.tokens, kItemRows)) {}

// Roughly the cycles of an item: both products, the softmax between them, packing all keys and values.
double Attention::cost(int64_t rows) const {
  const double tokens = static_cast<double>(sizes_.tokens + memory_.tokens), depth = static_cast<double>(width_);
  const double scores = static_cast<double>(up_to(rows, 6)) * tokens;
  return scores * depth / (kernels_.half ? 16 : 8) + 2 * scores + tokens * depth / 2 + 500;
}

int64_t Attention::cut(int threads) {
  const int64_t least = divided_up(sizes_.tokens, most_rows_), heads = sizes_.n * sizes_.heads;
  double best = 0;
  for (int64_t parts = least; parts <= std::min(sizes_.tokens, least + threads); ++parts) {
    const int64_t rounds = divided_up(heads * parts, threads);
    const double time = static_cast<double>(rounds) * cost(divided_up(sizes_.tokens, parts));
    if (best == 0 || time < best) {
      best = time;
      parts_ = parts;
    }
  }
  return heads * parts_;
}

Attention::Layout Attention::layout() const {
  Layout l;
  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t start = at;
    at += up_to(bytes, kAlign);
    return start;
  };
  const int64_t columns = up_to(block_, kPanel), rows = std::min(kRows, most_rows_);
  const int64_t all_rows = blocks_ > 1 ? most_rows_ : rows;
  l.keys = take(depth_k_ * columns * bytes_);
  l.values = take(up_to(block_, kernels_.k_multiple) * width_ * bytes_);
  l.copies = take(memory_.tokens > 0 ? 2 * block_ * depth_ * bytes_ : 0);
  l.scores = take(rows * columns * 4);
  l.weights = take(rows * weights_stride_ * bytes_);
  l.sums = take(all_rows * width_ * 4);
  l.more = take(blocks_ > 1 ? rows * width_ * 4 : 0);
  l.most = take(most_rows_ * 4);
  l.total = take(most_rows_ * 4);
  l.factor = take(rows * 4);
  l.end = at;
  return l;
}

int64_t Attention::scratch_bytes() const { return layout().end; }

// c = a b for columns of b and c in groups of 64 (the last may be narrower), m rows of c in each.
void Attention::multiply(
    const void* a, int64_t a_stride, int64_t m, int64_t k, const char* b, int64_t columns, float* c
) const {
  Gemm g;
  g.a = a;
  g.a_stride = a_stride;
  g.m = m;
  g.k = k;
  for (int64_t first = 0; first < columns; first += kGroup) {
    const int64_t width = std::min(kGroup, columns - first);
    g.panels = width / kPanel;
    g.b = b + first * up_to(k, kernels_.k_multiple) * bytes_;
    g.c = c + first * m;
    kernels_.gemm(g);
  }
}

// Rows first .. first + count of the memory's and then the tokens'. They are where they are, or if some are the
// memory's copied to lie side by side.
Attention::Rows
Attention::taken(int64_t first, int64_t count, const float* memory, const char* tokens, char* copies) const {
  const int64_t stride = source_.stride * bytes_, row = depth_ * bytes_;
  tokens += std::max<int64_t>(first - memory_.tokens, 0) * stride;
  const int64_t kept = std::clamp<int64_t>(memory_.tokens - first, 0, count);
  if (kept == 0) return {tokens, source_.stride, count};
  memory += first * depth_;
  for (int64_t i = 0; i < kept * depth_; ++i)
    if (kernels_.half)
      reinterpret_cast<uint16_t*>(copies)[i] = bf16_from_float(memory[i]);
    else
      reinterpret_cast<float*>(copies)[i] = memory[i];
  for (int64_t i = kept; i < count; ++i, tokens += stride)
    std::memcpy(copies + i * row, tokens, static_cast<size_t>(row));
  return {copies, depth_, count};
}

// Keys and values as the b of both products, in groups of 64 columns.
void Attention::pack(const Rows& keys, const Rows& values, char* packed_keys, char* packed_values) const {
  Operand o;
  o.stride = keys.stride;
  o.length = depth_;
  o.k = depth_k_;
  for (int64_t first = 0; first < keys.count; first += kGroup) {
    o.source = keys.data + first * o.stride * bytes_;
    o.count = std::min(kGroup, keys.count - first);
    o.width = up_to(o.count, kPanel);
    o.b = packed_keys + first * o.k * bytes_;
    kernels_.pack_columns(o);
  }
  o.stride = values.stride;
  o.count = values.count;
  o.k = up_to(values.count, kernels_.k_multiple);
  for (int64_t first = 0; first < depth_; first += kGroup) {
    o.source = values.data + first * bytes_;
    o.length = std::min(kGroup, depth_ - first);
    o.width = up_to(o.length, kPanel);
    o.b = packed_values + first * o.k * bytes_;
    kernels_.pack_rows(o);
  }
}

void Attention::work(int64_t item, const Run&, char* scratch) const {
  const int64_t part = item % parts_, head = item / parts_ % sizes_.heads, image = item / parts_ / sizes_.heads;
  const int64_t first = sizes_.tokens * part / parts_, rows = sizes_.tokens * (part + 1) / parts_ - first;
  const int64_t pixel = source_.stride * bytes_, channels = sizes_.channels * bytes_;
  const char* source = static_cast<const char*>(source_.data) + image * sizes_.tokens * pixel + head * depth_ * bytes_;
  const int64_t target_at = (image * sizes_.tokens + first) * target_.stride + head * depth_;
  char* target = static_cast<char*>(target_.data) + target_at * bytes_;
  const int64_t memory_at = head * memory_.tokens * depth_;
  const Layout l = layout();
  const auto floats = [scratch](int64_t at) { return reinterpret_cast<float*>(scratch + at); };
  std::fill_n(floats(l.most), rows, std::numeric_limits<float>::lowest());
  std::fill_n(floats(l.total), rows, 0.0f);

  Softmax s;
  s.scores = floats(l.scores);
  s.scale = scale_;
  s.factor = floats(l.factor);
  s.weights = scratch + l.weights;
  s.stride = weights_stride_;
  for (int64_t block = 0; block < blocks_; ++block) {
    const int64_t from = block * block_, count = std::min(block_, sizes_.tokens + memory_.tokens - from);
    char* copies = scratch + l.copies;
    const Rows keys = taken(from, count, memory_.keys + memory_at, source + channels, copies);
    const Rows values =
        taken(from, count, memory_.values + memory_at, source + 2 * channels, copies + block_ * depth_ * bytes_);
    s.columns = keys.count;
    s.k = up_to(s.columns, kernels_.k_multiple);
    pack(keys, values, scratch + l.keys, scratch + l.values);
    for (int64_t row = 0; row < rows; row += kRows) {
      s.m = std::min(kRows, rows - row);
      s.most = floats(l.most) + row;
      s.sum = floats(l.total) + row;
      const char* queries = source + (first + row) * pixel;
      multiply(queries, source_.stride, s.m, depth_, scratch + l.keys, up_to(s.columns, kPanel), s.scores);
      kernels_.softmax(s);
      float* sums = floats(l.sums) + (blocks_ > 1 ? row * width_ : 0);
      float* products = block == 0 ? sums : floats(l.more);
      multiply(s.weights, s.stride, s.m, s.k, scratch + l.values, width_, products);
      for (int64_t column = 0; column < width_; column += kGroup) {
        const int64_t width = std::min(kGroup, width_ - column), at = column * s.m;
        if (block > 0) kernels_.rescale_add(sums + at, products + at, s.factor, s.m, width);
        if (block + 1 == blocks_)
          kernels_.store_divided(
              sums + at, width, s.m, std::min(width, depth_ - column), s.sum,
              target + (row * target_.stride + column) * bytes_, target_.stride
          );
      }
    }
  }
}

}  // namespace ddpm_fast::inference
