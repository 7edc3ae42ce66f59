// rms_norm_silu: y = act(h sqrt(C) / max(|h|, eps) weight + beta) + residual at each place, with |h| over the channels,
// and its gradients.
//
// The places of a sample are cut into tiles of all channels, small enough for the cache to hold what is read again. The
// backward pass takes the norm again, which is cheaper than to store and load it. Sums over places are those of parts
// of a sample, added up in their order; parts depend on the shape alone.
#include <cmath>
#include <memory>

#include "rms_norm_rows.h"

namespace ddpm_fast {
namespace {

constexpr int64_t kElements = 8192;                   // of a tile, about
constexpr int64_t kFewPlaces = 32, kPlaces = 2048;    // of a tile in contiguous format, where there are so many
constexpr int64_t kSumRows = 64, kSumColumns = 2048;  // what one call of a sum may take (row_sums.h)
constexpr int64_t kParts = 16;                        // of a sample, at most
constexpr int64_t kLine = 16;                         // floats

// One channel, or one place, is both formats; then the one with the longer rows is taken.
bool is_across(const Shape& shape) { return shape.channels > 1 && (shape.channels_last || shape.inner == 1); }

// How the places of a sample are cut: tiles of `places` of them, and parts of `tiles` tiles.
struct Cut {
  int64_t places, tiles, parts;
  explicit Cut(const Shape& shape) {
    const int64_t wanted = std::max<int64_t>(1, kElements / shape.channels);
    places = is_across(shape) ? wanted : std::min(std::max(wanted / kLine * kLine, kFewPlaces), kPlaces);
    places = std::min(places, shape.inner);
    const int64_t all = (shape.inner + places - 1) / places;
    tiles = (all + kParts - 1) / kParts;
    parts = (all + tiles - 1) / tiles;
  }
};

// weight and beta as numbers.
class Affine {
 public:
  explicit Affine(const RmsNormSiluArgs& args)
      : weight_stride_(args.weight_per_sample ? args.shape.channels : 0),
        beta_stride_(args.beta_per_sample ? args.shape.channels : 0),
        weight_(as_floats(args.weight, args.shape.channels * (args.weight_per_sample ? args.shape.n : 1), 1.0f)),
        beta_(as_floats(args.beta, args.shape.channels * (args.beta_per_sample ? args.shape.n : 1), -0.0f)) {}
  const float* weight(int64_t n) const { return weight_.data() + n * weight_stride_; }
  const float* beta(int64_t n) const { return beta_.data() + n * beta_stride_; }

 private:
  int64_t weight_stride_, beta_stride_;
  std::vector<float> weight_, beta_;
};

// What a thread needs for a tile. Nothing is filled before it is used.
class Scratch {
 public:
  Scratch(const Shape& shape, const Cut& cut, int tiles)
      : elements_((shape.channels * cut.places + kLine - 1) / kLine * kLine),
        memory_(new float[static_cast<size_t>(tiles * elements_ + kLine)]), squares(static_cast<size_t>(cut.places)),
        products(squares.size()), factor(squares.size()), slope(squares.size()) {}
  float* tile(int k) const {
    const size_t off = reinterpret_cast<uintptr_t>(memory_.get()) / sizeof(float) % kLine;
    return memory_.get() + (kLine - off) + k * elements_;
  }

 private:
  int64_t elements_;
  std::unique_ptr<float[]> memory_;

 public:
  std::vector<double> squares, products;  // of places
  std::vector<float> factor, slope;
};

// Some places of one sample, all channels.
struct Place {
  const RmsNormSiluArgs& args;
  bool across;
  int64_t n, first, count;
  Rows rows() const {
    const Shape& s = args.shape;
    const int64_t start = n * s.elements();
    return across ? Rows{start + first * s.channels, count, s.channels, s.channels}
                  : Rows{start + first, s.channels, count, s.inner};
  }
};

// Calls body(rows, first row, first column) for pieces of which a sum may be taken at once.
template <typename Body>
void for_each_piece(const Rows& rows, const Body& body) {
  for (int64_t r = 0; r < rows.count; r += kSumRows) {
    for (int64_t i = 0; i < rows.length; i += kSumColumns) {
      const int64_t count = std::min(kSumRows, rows.count - r), length = std::min(kSumColumns, rows.length - i);
      body(Rows{0, count, length, rows.stride}, r, i);
    }
  }
}

FloatRows from(const FloatRows& rows, int64_t r, int64_t i) { return {rows.v + r * rows.stride + i, rows.stride}; }

RmsCoefficients from(const RmsCoefficients& c, int64_t channel, int64_t place) {
  return {c.weight + channel, c.beta + channel, c.factor + place, c.slope + place};
}

// Sets scratch.squares and scratch.factor.
void take_norms(const Place& at, const FloatRows& h, Scratch& scratch) {
  std::fill(scratch.squares.begin(), scratch.squares.end(), 0.0);
  for_each_piece(at.rows(), [&](const Rows& rows, int64_t r, int64_t i) {
    rms_sum_squares(from(h, r, i), scratch.squares.data() + (at.across ? r : i), rows, at.across);
  });
  const double root = std::sqrt(static_cast<double>(at.args.shape.channels)), eps = static_cast<double>(at.args.eps);
  for (size_t p = 0; p < static_cast<size_t>(at.count); ++p) {
    const double norm = std::sqrt(scratch.squares[p]);
    scratch.factor[p] = static_cast<float>(root / (norm < eps ? eps : norm));  // NaN stays NaN
  }
}

// Sets scratch.slope: factor mean(g_x xhat) over the channels, 0 where the norm counts as constant.
void take_slopes(
    const Place& at, const FloatRows& g_u, const FloatRows& h, const RmsCoefficients& c, Scratch& scratch
) {
  std::fill(scratch.products.begin(), scratch.products.end(), 0.0);
  for_each_piece(at.rows(), [&](const Rows& rows, int64_t r, int64_t i) {
    const int64_t channel = at.across ? i : r, place = at.across ? r : i;
    double* products = scratch.products.data() + place;
    rms_sum_products(from(g_u, r, i), from(h, r, i), from(c, channel, place), products, rows, at.across);
  });
  const double inverse = 1.0 / static_cast<double>(at.args.shape.channels), eps = static_cast<double>(at.args.eps);
  for (size_t p = 0; p < static_cast<size_t>(at.count); ++p) {
    const double factor = static_cast<double>(scratch.factor[p]), mean = factor * scratch.products[p] * inverse;
    scratch.slope[p] = std::sqrt(scratch.squares[p]) < eps ? 0.0f : static_cast<float>(factor * mean);
  }
}

// Calls body(Place, part of its sample, Scratch of `tiles` tiles) for all tiles, in parallel.
template <typename Body>
void for_each_place(const RmsNormSiluArgs& args, const Cut& cut, int threads, int tiles, const Body& body) {
  const Shape& shape = args.shape;
  const bool across = is_across(shape);
  const int useful = useful_threads(shape.n * shape.elements(), threads);
  parallel_for(shape.n * cut.parts, useful, [&](int64_t begin, int64_t end) {
    Scratch scratch(shape, cut, tiles);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % cut.parts, first = part * cut.tiles * cut.places;
      const int64_t last = std::min(first + cut.tiles * cut.places, shape.inner);
      for (int64_t place = first; place < last; place += cut.places)
        body(Place{args, across, i / cut.parts, place, std::min(cut.places, last - place)}, part, scratch);
    }
  });
}

}  // namespace

Status rms_norm_silu_cpu(const RmsNormSiluArgs& args, int threads) {
  const Shape& shape = args.shape;
  if (shape.n <= 0 || shape.elements() <= 0) return {};
  const Affine affine(args);
  for_each_place(args, Cut(shape), threads, 3, [&](const Place& at, int64_t, Scratch& scratch) {
    const Rows rows = at.rows();
    const FloatRows h = load_rows(args.h, rows, scratch.tile(0));
    take_norms(at, h, scratch);
    const RmsCoefficients c{affine.weight(at.n), affine.beta(at.n), scratch.factor.data(), nullptr};
    const FloatRows added = args.residual ? load_rows(args.residual, rows, scratch.tile(1)) : FloatRows{nullptr, 0};
    const StoreRows y = begin_store_rows(args.y, rows, scratch.tile(2));
    rms_normalize_rows(h, c, added, y, rows, at.across, args.silu);
    store_rows(args.y, rows, y);
  });
  return {};
}

Status rms_norm_silu_backward_cpu(const RmsNormSiluArgs& args, int threads) {
  const Shape& shape = args.shape;
  if (shape.n <= 0 || shape.elements() <= 0) return {};
  const Affine affine(args);
  const Cut cut(shape);
  const int64_t channels = shape.channels;
  const bool summed = args.d_weight != nullptr;
  std::vector<double> sums(summed ? static_cast<size_t>(shape.n * cut.parts * 2 * channels) : 0);
  for_each_place(args, cut, threads, 3, [&](const Place& at, int64_t part, Scratch& scratch) {
    const Rows rows = at.rows();
    const FloatRows h = load_rows(args.h, rows, scratch.tile(0)), g = load_rows(args.g, rows, scratch.tile(1));
    take_norms(at, h, scratch);
    const RmsCoefficients c{affine.weight(at.n), affine.beta(at.n), scratch.factor.data(), scratch.slope.data()};
    if (args.silu) rms_activation_gradient_rows(g, h, c, scratch.tile(2), rows, at.across);
    const FloatRows g_u = args.silu ? FloatRows{scratch.tile(2), rows.length} : g;
    if (summed) {
      double* of_part = sums.data() + (at.n * cut.parts + part) * 2 * channels;
      for_each_piece(rows, [&](const Rows& piece, int64_t r, int64_t i) {
        const int64_t channel = at.across ? i : r, place = at.across ? r : i;
        double* const to[] = {of_part + channel, of_part + channels + channel};
        rms_sum_gradients(from(g_u, r, i), from(h, r, i), from(c, channel, place), to, piece, at.across);
      });
    }
    if (!args.g_h) return;
    take_slopes(at, g_u, h, c, scratch);
    const StoreRows g_h = begin_store_rows(args.g_h, rows, scratch.tile(args.silu ? 1 : 2));  // the one not read here
    rms_pull_back_rows(g_u, h, c, g_h, rows, at.across);
    store_rows(args.g_h, rows, g_h);
  });
  for (int64_t n = 0; summed && n < shape.n; ++n) {
    const double* first = sums.data() + n * cut.parts * 2 * channels;
    for (int64_t c = 0; c < 2 * channels; ++c) {
      double sum = 0.0;
      for (int64_t part = 0; part < cut.parts; ++part)
        sum += first[part * 2 * channels + c];
      (c < channels ? args.d_weight + c : args.d_beta + (c - channels))[n * channels] = static_cast<float>(sum);
    }
  }
  return {};
}

}  // namespace ddpm_fast
