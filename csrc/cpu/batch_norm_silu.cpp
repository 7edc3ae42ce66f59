// batch_norm_silu: y = act((h - mean) rstd weight + bias) + temb[n, c], with the statistics of the batch or given ones,
// and its gradients.
//
// An image is read twice in either direction, and nothing but it and the statistics is kept in between: the backward
// pass takes the derivative of SiLU again, which is cheaper than to store and load it. Sums over the batch are those of
// parts of it, added up in their order; parts depend on the shape alone.
#include <cmath>

#include "batch_norm_rows.h"

namespace ddpm_fast {
namespace {

constexpr int64_t kBlock = 8192, kLongest = 2048;  // elements of a block, about; of a row, along (row_sums.h)
constexpr int64_t kSumRows = 64;                   // of a block, across (row_sums.h)
constexpr int64_t kParts = 64, kLeast = 4096;      // parts at most; elements of a piece of a sample at least
constexpr int64_t kShiftSamples = 16, kShiftValues = 64;

// One channel, or one place, is both formats; then the one with the longer rows is taken.
bool is_across(const Shape& shape) { return shape.channels > 1 && (shape.channels_last || shape.inner == 1); }

// Rows of one sample, which are places (across) or channels, in blocks that the loops may take at once.
struct Block {
  Rows rows;
  int64_t n, channel;  // the first
};

// How the batch is cut: every sample into pieces of some rows, and all pieces, in their order, into parts.
class Cut {
 public:
  explicit Cut(const Shape& shape) : shape_(shape), across(is_across(shape)) {
    outer_ = across ? shape.inner : shape.channels;
    const int64_t wanted = std::min((kParts + shape.n - 1) / shape.n, shape.elements() / kLeast);
    rows_ = (outer_ + std::max<int64_t>(1, wanted) - 1) / std::max<int64_t>(1, wanted);
    pieces = (outer_ + rows_ - 1) / rows_;
    parts = std::min(shape.n * pieces, kParts);
  }

  int64_t block_elements() const { return across ? std::max(kBlock, shape_.channels) : kBlock; }

  // Calls body(part, first piece, last piece) for all parts, in parallel.
  template <typename Body>
  void for_each_part(int threads, const Body& body) const {
    const int64_t all = shape_.n * pieces;
    parallel_for(parts, useful_threads(shape_.n * shape_.elements(), threads), [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part)
        body(part, all * part / parts, all * (part + 1) / parts);
    });
  }

  // Calls body(Block) for all blocks of a piece.
  template <typename Body>
  void for_each_block(int64_t piece, const Body& body) const {
    const int64_t n = piece / pieces, first = piece % pieces * rows_, last = std::min(first + rows_, outer_);
    const int64_t width = across ? shape_.channels : shape_.inner, start = n * shape_.elements();
    const int64_t length = across ? width : std::min(width, kLongest);
    const int64_t most = std::min(std::max<int64_t>(1, kBlock / length), across ? kSumRows : kBlock);
    for (int64_t row = first; row < last; row += most) {
      for (int64_t i = 0; i < width; i += length) {
        const Rows rows{start + row * width + i, std::min(most, last - row), std::min(length, width - i), width};
        body(Block{rows, n, across ? 0 : row});
      }
    }
  }

 private:
  Shape shape_;
  int64_t outer_, rows_;

 public:
  const bool across;
  int64_t pieces, parts;
};

// Memory of a thread for the values of a block, aligned.
class Scratch {
 public:
  explicit Scratch(const Cut& cut) : values_(static_cast<size_t>(cut.block_elements() + kLine)) {}
  float* data() {
    const size_t off = reinterpret_cast<uintptr_t>(values_.data()) / sizeof(float) % kLine;
    return values_.data() + (kLine - off);
  }

 private:
  static constexpr size_t kLine = 16;  // floats
  std::vector<float> values_;
};

// What the loops need of each channel.
struct Channels {
  std::vector<float> offset, scale, beta, base, slope, temb;
  int64_t channels;
  explicit Channels(const BatchNormSiluArgs& args)
      : offset(args.mean, args.mean + args.shape.channels), scale(as_floats(args.weight, args.shape.channels, 1.0f)),
        beta(as_floats(args.bias, args.shape.channels, -0.0f)), base(offset.size()), slope(offset.size()),
        temb(as_floats(args.temb, args.temb ? args.shape.n * args.shape.channels : 0, 0.0f)),
        channels(args.shape.channels) {
    for (size_t c = 0; c < scale.size(); ++c)
      scale[c] = static_cast<float>(rstd(args, c) * static_cast<double>(scale[c]));
  }
  static double rstd(const BatchNormSiluArgs& args, size_t c) {
    return 1.0 / std::sqrt(static_cast<double>(args.var[c]) + static_cast<double>(args.eps));
  }
  BatchCoefficients at(const Block& block) const {
    const int64_t c = block.channel;
    const float* added = temb.empty() ? nullptr : temb.data() + block.n * channels + c;
    return {offset.data() + c, scale.data() + c, beta.data() + c, added, base.data() + c, slope.data() + c};
  }
};

// Two sums for each channel, over parts of the batch.
class Sums {
 public:
  Sums(const Cut& cut, int64_t channels)
      : channels_(static_cast<size_t>(channels)), values_(2 * static_cast<size_t>(cut.parts) * channels_, 0.0) {}
  double* first(int64_t part) { return values_.data() + 2 * static_cast<size_t>(part) * channels_; }
  double* second(int64_t part) { return first(part) + channels_; }
  void add_up() {  // into the first part
    for (size_t at = 2 * channels_; at < values_.size(); at += 2 * channels_) {
      for (size_t c = 0; c < 2 * channels_; ++c)
        values_[c] += values_[at + c];
    }
  }

 private:
  size_t channels_;
  std::vector<double> values_;
};

// A value near the mean of each channel: that of a few values from samples all over the batch.
std::vector<float> take_shift(const BatchNormSiluArgs& args, const Cut& cut, const BatchKind& kind) {
  const Shape& shape = args.shape;
  const int64_t samples = std::min(shape.n, kShiftSamples), values = std::min(shape.inner, kShiftValues / samples);
  std::vector<double> sums(static_cast<size_t>(shape.channels), 0.0);
  std::vector<float> scratch(static_cast<size_t>(shape.channels * values)), shift(sums.size());
  for (int64_t k = 0; k < samples; ++k) {
    const int64_t start = k * shape.n / samples * shape.elements();
    const Rows rows = cut.across ? Rows{start, values, shape.channels, shape.channels}
                                 : Rows{start, shape.channels, values, shape.inner};
    double* to = sums.data();
    batch_sum_values(kind, read_rows(args.h, rows, kind.half, scratch.data()), &to, rows);
  }
  for (size_t c = 0; c < sums.size(); ++c)
    shift[c] = static_cast<float>(sums[c] / static_cast<double>(samples * values));
  return shift;
}

// Sets args.mean and args.var.
void take_statistics(const BatchNormSiluArgs& args, const Cut& cut, const BatchKind& kind, int threads) {
  const std::vector<float> shift = take_shift(args, cut, kind);
  Sums sums(cut, args.shape.channels);
  cut.for_each_part(threads, [&](int64_t part, int64_t first, int64_t last) {
    Scratch scratch(cut);
    for (int64_t piece = first; piece < last; ++piece) {
      cut.for_each_block(piece, [&](const Block& block) {
        double* const to[] = {sums.first(part) + block.channel, sums.second(part) + block.channel};
        const ImageRows h = read_rows(args.h, block.rows, kind.half, scratch.data());
        batch_sum_moments(kind, h, shift.data() + block.channel, to, block.rows);
      });
    }
  });
  sums.add_up();
  const double inverse = 1.0 / static_cast<double>(args.shape.n * args.shape.inner);
  for (size_t c = 0; c < shift.size(); ++c) {
    const double mean = sums.first(0)[c] * inverse, var = sums.second(0)[c] * inverse - mean * mean;
    args.mean[c] = static_cast<float>(static_cast<double>(shift[c]) + mean);
    args.var[c] = static_cast<float>(var < 0.0 ? 0.0 : var);  // NaN stays NaN
  }
}

// From the sums of g_u and g_u d: the gradients of weight and bias, and what all elements of a channel need.
void set_gradients(const BatchNormSiluArgs& args, Sums& sums, Channels& channels) {
  const double inverse = 1.0 / static_cast<double>(args.shape.n * args.shape.inner);
  for (size_t c = 0; c < channels.offset.size(); ++c) {
    const double of_g = sums.first(0)[c], of_gd = sums.second(0)[c], rstd = Channels::rstd(args, c);
    args.d_bias[c] = static_cast<float>(of_g);
    args.d_weight[c] = static_cast<float>(rstd * of_gd);
    if (!args.of_batch) continue;
    const double scale = static_cast<double>(channels.scale[c]);
    channels.base[c] = static_cast<float>(scale * of_g * inverse);
    channels.slope[c] = static_cast<float>(scale * rstd * rstd * of_gd * inverse);
  }
}

}  // namespace

Status batch_norm_silu_cpu(const BatchNormSiluArgs& args, int threads) {
  if (args.shape.n <= 0 || args.shape.elements() <= 0) return {};
  const Cut cut(args.shape);
  const BatchKind kind{cut.across, args.silu, args.h.dtype == DType::bf16};
  if (args.of_batch) take_statistics(args, cut, kind, threads);
  const Channels channels(args);
  cut.for_each_part(threads, [&](int64_t, int64_t first, int64_t last) {
    Scratch in(cut), out(cut);
    for (int64_t piece = first; piece < last; ++piece) {
      cut.for_each_block(piece, [&](const Block& block) {
        const ImageRows h = read_rows(args.h, block.rows, kind.half, in.data());
        write_rows(args.y, block.rows, kind.half, out.data(), [&](const OutputRows& y) {
          batch_normalize_rows(kind, h, channels.at(block), y, block.rows);
        });
      });
    }
  });
  return {};
}

Status batch_norm_silu_backward_cpu(const BatchNormSiluArgs& args, int threads) {
  const Shape& shape = args.shape;
  if (shape.n <= 0 || shape.elements() <= 0) return {};
  const Cut cut(shape);
  const BatchKind kind{cut.across, args.silu, args.h.dtype == DType::bf16 && args.g.dtype == DType::bf16};
  Channels channels(args);
  Sums sums(cut, shape.channels);
  // Those of g, for temb: of every piece, where pieces of a sample share channels.
  const int64_t rows_of_temb = shape.n * (cut.across ? cut.pieces : 1);
  std::vector<double> of_temb(args.g_temb ? static_cast<size_t>(rows_of_temb * shape.channels) : 0, 0.0);
  const auto gradient = [&](const Block& block, const ImageRows& g, const ImageRows& h, Scratch& scratch) {
    batch_activation_gradient_rows(kind, g, h, channels.at(block), scratch.data(), block.rows);
    return FloatRows{scratch.data(), block.rows.length};
  };
  cut.for_each_part(threads, [&](int64_t part, int64_t first, int64_t last) {
    Scratch a(cut), b(cut), c(cut);
    for (int64_t piece = first; piece < last; ++piece) {
      cut.for_each_block(piece, [&](const Block& block) {
        const ImageRows h = read_rows(args.h, block.rows, kind.half, a.data());
        const ImageRows g = read_rows(args.g, block.rows, kind.half, b.data());
        const FloatRows g_u = gradient(block, g, h, c);
        double* const to[] = {sums.first(part) + block.channel, sums.second(part) + block.channel};
        batch_sum_gradients(kind, g_u, h, channels.at(block).offset, to, block.rows);
        if (of_temb.empty()) return;
        double* temb = of_temb.data() + (cut.across ? piece : block.n) * shape.channels + block.channel;
        batch_sum_values(kind, g, &temb, block.rows);
      });
    }
  });
  sums.add_up();
  set_gradients(args, sums, channels);
  for (int64_t i = 0; i < shape.n * shape.channels && args.g_temb; ++i) {
    const int64_t pieces = cut.across ? cut.pieces : 1, n = i / shape.channels, c = i % shape.channels;
    double sum = 0.0;
    for (int64_t k = 0; k < pieces; ++k)
      sum += of_temb[static_cast<size_t>((n * pieces + k) * shape.channels + c)];
    args.g_temb[i] = static_cast<float>(sum);
  }
  if (!args.g_h) return {};
  cut.for_each_part(threads, [&](int64_t, int64_t first, int64_t last) {
    Scratch a(cut), b(cut), c(cut);
    for (int64_t piece = first; piece < last; ++piece) {
      cut.for_each_block(piece, [&](const Block& block) {
        const ImageRows h = read_rows(args.h, block.rows, kind.half, a.data());
        const FloatRows g_u = gradient(block, read_rows(args.g, block.rows, kind.half, b.data()), h, c);
        write_rows(args.g_h, block.rows, kind.half, b.data(), [&](const OutputRows& g_h) {  // g has been read
          batch_pull_back_rows(kind, g_u, h, channels.at(block), g_h, block.rows);
        });
      });
    }
  });
  return {};
}

}  // namespace ddpm_fast
