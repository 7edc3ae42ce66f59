// Linear attention: parts of the product of keys and values, then the product of queries with their merged sum.
#include "linear_attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "../../dispatch.h"

namespace ddpm_fast::inference {
namespace {

constexpr int64_t kAlign = 64;
constexpr int64_t kPartTokens = 256;  // their keys and values stay in the core's first caches
constexpr int64_t kRows = 64;         // of a product with queries
constexpr int64_t kItemTokens = 1024;
constexpr int64_t kGroup = kGroupPanels * kPanel;

int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int64_t divided_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

const LinearAttention::Sizes&
checked(const LinearAttention::Sizes& sizes, double scale, const LinearAttention::Memory& memory) {
  if (sizes.n < 1 || sizes.tokens < 1)
    throw std::invalid_argument(
        "n and tokens must be at least 1, got " + std::to_string(sizes.n) + " and " + std::to_string(sizes.tokens)
    );
  if (sizes.heads < 1 || sizes.channels < 1 || sizes.channels % (kPanel * sizes.heads))
    throw std::invalid_argument(
        "channels must be a multiple of 16 times the heads, got " + std::to_string(sizes.channels) + " channels and " +
        std::to_string(sizes.heads) + " heads"
    );
  if (!(scale > 0)) throw std::invalid_argument("scale must be positive, got " + std::to_string(scale));
  if (memory.tokens < 0 || (memory.tokens > 0 && (memory.keys == nullptr || memory.values == nullptr)))
    throw std::invalid_argument(
        "memory needs keys, values and a number of tokens, got " + std::to_string(memory.tokens) + " tokens"
    );
  return sizes;
}

// Offsets of pieces one after the other, each on a cache line.
class Taker {
 public:
  int64_t operator()(int64_t bytes) {
    const int64_t start = at_;
    at_ += up_to(bytes, kAlign);
    return start;
  }

 private:
  int64_t at_ = 0;
};

}  // namespace

LinearAttention::LinearAttention(const Sizes& asked, double factor, const Memory& extra)
    : sizes(checked(asked, factor, extra)), scale(static_cast<float>(factor)), memory(extra),
      depth(asked.channels / asked.heads), parts(divided_up(asked.tokens, kPartTokens)),
      memory_count(divided_up(extra.tokens, kPartTokens)), part_floats((depth + 2) * depth),
      floats_(static_cast<size_t>((asked.n * parts + memory_count) * asked.heads * part_floats + kAlign / 4)) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(floats_.data());
  start_ = reinterpret_cast<float*>((address + kAlign - 1) / kAlign * kAlign);
}

float* LinearAttention::image_parts(int64_t image, int64_t head) const {
  return start_ + (image * sizes.heads + head) * parts * part_floats;
}

float* LinearAttention::memory_parts(int64_t head) const {
  return image_parts(sizes.n, 0) + head * memory_count * part_floats;
}

LinearContext::LinearContext(const Kernels& kernels, std::shared_ptr<LinearAttention> attention, Place source)
    : Layer(kernels), attention_(std::move(attention)), source_(source),
      weights_stride_(up_to(kPartTokens, kernels.k_multiple) + kAlign / bytes_) {}

int64_t LinearContext::cut(int) {
  const LinearAttention& a = *attention_;
  return (a.sizes.n * a.parts + a.memory_count) * a.sizes.heads;
}

LinearContext::Layout LinearContext::layout() const {
  const LinearAttention& a = *attention_;
  const int64_t memory = std::min(a.memory.tokens, kPartTokens) * a.depth * bytes_;
  Taker take;
  Layout l;
  l.weights = take(a.depth * weights_stride_ * bytes_);
  l.values = take(up_to(kPartTokens, kernels_.k_multiple) * a.depth * bytes_);
  l.keys_of_memory = take(memory);
  l.values_of_memory = take(memory);
  l.end = take(0);
  return l;
}

int64_t LinearContext::scratch_bytes() const { return layout().end; }

// Tokens first .. first + count as rows of activations.
void LinearContext::copy_memory(const float* source, int64_t first, int64_t count, char* rows) const {
  const int64_t depth = attention_->depth;
  for (int64_t j = 0; j < count; ++j)
    for (int64_t d = 0; d < depth; ++d) {
      const float value = source[d * attention_->memory.tokens + first + j];
      if (kernels_.half)
        reinterpret_cast<uint16_t*>(rows)[j * depth + d] = bf16_from_float(value);
      else
        reinterpret_cast<float*>(rows)[j * depth + d] = value;
    }
}

void LinearContext::work(int64_t item, const Run&, char* scratch) const {
  const LinearAttention& a = *attention_;
  const Layout l = layout();
  const int64_t of_images = a.sizes.n * a.sizes.heads * a.parts;
  KeyWeights w;
  Operand o;
  float* part;
  if (item < of_images) {
    const int64_t index = item % a.parts, head = item / a.parts % a.sizes.heads, image = item / a.parts / a.sizes.heads;
    const int64_t first = a.sizes.tokens * index / a.parts;
    const int64_t at = (image * a.sizes.tokens + first) * source_.stride + a.sizes.channels + head * a.depth;
    w.count = a.sizes.tokens * (index + 1) / a.parts - first;
    w.keys = static_cast<const char*>(source_.data) + at * bytes_;
    w.key_stride = source_.stride;
    o.source = static_cast<const char*>(w.keys) + a.sizes.channels * bytes_;
    part = a.image_parts(image, head) + index * a.part_floats;
  } else {
    const int64_t index = (item - of_images) % a.memory_count, head = (item - of_images) / a.memory_count;
    const int64_t first = a.memory.tokens * index / a.memory_count, at = head * a.depth * a.memory.tokens;
    w.count = a.memory.tokens * (index + 1) / a.memory_count - first;
    copy_memory(a.memory.keys + at, first, w.count, scratch + l.keys_of_memory);
    copy_memory(a.memory.values + at, first, w.count, scratch + l.values_of_memory);
    w.keys = scratch + l.keys_of_memory;
    w.key_stride = a.depth;
    o.source = scratch + l.values_of_memory;
    part = a.memory_parts(head) + index * a.part_floats;
  }
  w.depth = a.depth;
  w.k = up_to(w.count, kernels_.k_multiple);
  w.weights = scratch + l.weights;
  w.weights_stride = weights_stride_;
  w.most = part;
  w.sum = part + a.depth;
  kernels_.key_weights(w);

  const char* values = static_cast<const char*>(o.source);
  o.stride = w.key_stride;
  o.count = w.count;
  o.k = w.k;
  o.b = scratch + l.values;
  Gemm g;
  g.a = w.weights;
  g.a_stride = weights_stride_;
  g.m = a.depth;
  g.k = w.k;
  g.b = o.b;
  for (int64_t first = 0; first < a.depth; first += kGroup) {
    o.source = values + first * bytes_;
    o.length = o.width = std::min(kGroup, a.depth - first);
    kernels_.pack_rows(o);
    g.panels = o.width / kPanel;
    g.c = part + (2 + first) * a.depth;
    kernels_.gemm(g);
  }
}

LinearOutput::LinearOutput(
    const Kernels& kernels, std::shared_ptr<LinearAttention> attention, Place source, Place target
)
    : Layer(kernels), attention_(std::move(attention)), source_(source), target_(target) {}

int64_t LinearOutput::cut(int threads) {
  const LinearAttention::Sizes& s = attention_->sizes;
  const int64_t heads = s.n * s.heads, wanted = divided_up(2 * threads, heads);
  splits_ = std::clamp(wanted, divided_up(s.tokens, kItemTokens), divided_up(s.tokens, kRows));
  return heads * splits_;
}

LinearOutput::Layout LinearOutput::layout() const {
  const LinearAttention& a = *attention_;
  Taker take;
  Layout l;
  l.parts = take((a.parts + a.memory_count) * static_cast<int64_t>(sizeof(float*)));
  l.rows = take(a.depth * std::min(kGroup, a.depth) * bytes_);
  l.context = take(up_to(a.depth, kernels_.k_multiple) * a.depth * bytes_);
  l.weights = take(kRows * a.depth * bytes_);
  l.sums = take(kRows * 4);
  l.products = take(kRows * kGroup * 4);
  l.end = take(0);
  return l;
}

int64_t LinearOutput::scratch_bytes() const { return layout().end; }

void LinearOutput::work(int64_t item, const Run&, char* scratch) const {
  const LinearAttention& a = *attention_;
  const Layout l = layout();
  const int64_t split = item % splits_, head = item / splits_ % a.sizes.heads, image = item / splits_ / a.sizes.heads;
  const float** parts = reinterpret_cast<const float**>(scratch + l.parts);
  for (int64_t i = 0; i < a.parts; ++i)
    parts[i] = a.image_parts(image, head) + i * a.part_floats;
  for (int64_t i = 0; i < a.memory_count; ++i)
    parts[a.parts + i] = a.memory_parts(head) + i * a.part_floats;

  Merge m;
  m.parts = parts;
  m.count = a.parts + a.memory_count;
  m.depth = a.depth;
  m.scale = a.scale;
  m.target = scratch + l.rows;
  Operand o;
  o.source = m.target;
  o.count = a.depth;
  o.k = up_to(a.depth, kernels_.k_multiple);
  for (m.first = 0; m.first < a.depth; m.first += kGroup) {
    m.width = std::min(kGroup, a.depth - m.first);
    kernels_.merge(m);
    o.stride = o.length = o.width = m.width;
    o.b = scratch + l.context + m.first * o.k * bytes_;
    kernels_.pack_rows(o);
  }

  const int64_t end = a.sizes.tokens * (split + 1) / splits_;
  RowWeights w;
  w.row_stride = source_.stride;
  w.depth = a.depth;
  w.weights = scratch + l.weights;
  w.sum = reinterpret_cast<float*>(scratch + l.sums);
  Gemm g;
  g.a = w.weights;
  g.a_stride = g.k = a.depth;
  g.c = reinterpret_cast<float*>(scratch + l.products);
  for (int64_t row = a.sizes.tokens * split / splits_; row < end; row += kRows) {
    const int64_t pixel = image * a.sizes.tokens + row;
    w.rows = static_cast<const char*>(source_.data) + (pixel * source_.stride + head * a.depth) * bytes_;
    w.m = g.m = std::min(kRows, end - row);
    kernels_.row_weights(w);
    char* target = static_cast<char*>(target_.data) + (pixel * target_.stride + head * a.depth) * bytes_;
    for (int64_t first = 0; first < a.depth; first += kGroup) {
      const int64_t width = std::min(kGroup, a.depth - first);
      g.panels = width / kPanel;
      g.b = scratch + l.context + first * o.k * bytes_;
      kernels_.gemm(g);
      kernels_.store_divided(g.c, width, g.m, width, w.sum, target + first * bytes_, target_.stride);
    }
  }
}

}  // namespace ddpm_fast::inference
