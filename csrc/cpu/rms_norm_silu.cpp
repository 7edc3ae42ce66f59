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

constexpr int64_t kAcross = 8192, kAlong = 32768;     // elements of a tile, about; long rows need fewer calls
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
    const bool across = is_across(shape);
    const int64_t wanted = std::max<int64_t>(1, (across ? kAcross : kAlong) / shape.channels);
    places = across ? wanted : std::min(std::max(wanted / kLine * kLine, kFewPlaces), kPlaces);
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

// Images as the loops read and write them: where they lie, or in `scratch` as float32.
class Images {
 public:
  Images(const RmsNormSiluArgs& args, bool across)
      : kind{across, args.silu, args.h.dtype == DType::bf16 && (!args.g || args.g.dtype == DType::bf16)} {}
  const RmsKind kind;

  ImageRows read(const Array& array, const Rows& rows, float* scratch) const {
    return read_rows(array, rows, kind.half, scratch);
  }
  // h of places side by side is packed: it is read again and again, and rows a power of two apart would share a few
  // lines of the first cache.
  ImageRows read_h(const Array& array, const Rows& rows, float* scratch) const {
    if (kind.across) return read(array, rows, scratch);
    const FloatRows floats = load_rows(array, rows, scratch);
    if (floats.stride == rows.length) return {floats.v, floats.stride};
    for (int64_t r = 0; r < rows.count; ++r)
      std::copy(floats.v + r * floats.stride, floats.v + r * floats.stride + rows.length, scratch + r * rows.length);
    return {scratch, rows.length};
  }
  ImageRows from(const ImageRows& h, int64_t r, int64_t i) const {
    const int64_t bytes = kind.across && kind.half ? 2 : 4;
    return {static_cast<const char*>(h.v) + (r * h.stride + i) * bytes, h.stride};
  }
  template <typename Body>
  void write(const Array& array, const Rows& rows, float* scratch, const Body& body) const {
    write_rows(array, rows, kind.half, scratch, body);
  }
};

// Sets scratch.squares and scratch.factor.
void take_norms(const Place& at, const Images& images, const ImageRows& h, Scratch& scratch) {
  std::fill(scratch.squares.begin(), scratch.squares.end(), 0.0);
  for_each_piece(at.rows(), [&](const Rows& rows, int64_t r, int64_t i) {
    rms_sum_squares(images.kind, images.from(h, r, i), scratch.squares.data() + (at.across ? r : i), rows);
  });
  const double root = std::sqrt(static_cast<double>(at.args.shape.channels)), eps = static_cast<double>(at.args.eps);
  for (size_t p = 0; p < static_cast<size_t>(at.count); ++p) {
    const double norm = std::sqrt(scratch.squares[p]);
    scratch.factor[p] = static_cast<float>(root / (norm < eps ? eps : norm));  // NaN stays NaN
  }
}

// Sets scratch.slope: factor mean(g_x xhat) over the channels, 0 where the norm counts as constant.
void take_slopes(
    const Place& at, const Images& images, const FloatRows& g_u, const ImageRows& h, const RmsCoefficients& c,
    Scratch& scratch
) {
  std::fill(scratch.products.begin(), scratch.products.end(), 0.0);
  for_each_piece(at.rows(), [&](const Rows& rows, int64_t r, int64_t i) {
    const int64_t channel = at.across ? i : r, place = at.across ? r : i;
    double* products = scratch.products.data() + place;
    const RmsCoefficients here = from(c, channel, place);
    rms_sum_products(images.kind, from(g_u, r, i), images.from(h, r, i), here, products, rows);
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
  const Images images(args, is_across(shape));
  for_each_place(args, Cut(shape), threads, 3, [&](const Place& at, int64_t, Scratch& scratch) {
    const Rows rows = at.rows();
    const ImageRows h = images.read_h(args.h, rows, scratch.tile(0));
    take_norms(at, images, h, scratch);
    const RmsCoefficients c{affine.weight(at.n), affine.beta(at.n), scratch.factor.data(), nullptr};
    const ImageRows added = args.residual ? images.read(args.residual, rows, scratch.tile(1)) : ImageRows{nullptr, 0};
    images.write(args.y, rows, scratch.tile(2), [&](const OutputRows& y) {
      rms_normalize_rows(images.kind, h, c, added, y, rows);
    });
  });
  return {};
}

Status rms_norm_silu_backward_cpu(const RmsNormSiluArgs& args, int threads) {
  const Shape& shape = args.shape;
  if (shape.n <= 0 || shape.elements() <= 0) return {};
  const Affine affine(args);
  const Cut cut(shape);
  const Images images(args, is_across(shape));
  const int64_t channels = shape.channels;
  const bool summed = args.d_weight != nullptr;
  std::vector<double> sums(summed ? static_cast<size_t>(shape.n * cut.parts * 2 * channels) : 0);
  for_each_place(args, cut, threads, 3, [&](const Place& at, int64_t part, Scratch& scratch) {
    const Rows rows = at.rows();
    const ImageRows h = images.read_h(args.h, rows, scratch.tile(0)), g = images.read(args.g, rows, scratch.tile(1));
    take_norms(at, images, h, scratch);
    const RmsCoefficients c{affine.weight(at.n), affine.beta(at.n), scratch.factor.data(), scratch.slope.data()};
    rms_activation_gradient_rows(images.kind, g, h, c, scratch.tile(2), rows);
    const FloatRows g_u{scratch.tile(2), rows.length};
    if (summed) {
      double* of_part = sums.data() + (at.n * cut.parts + part) * 2 * channels;
      for_each_piece(rows, [&](const Rows& piece, int64_t r, int64_t i) {
        const int64_t channel = at.across ? i : r, place = at.across ? r : i;
        double* const to[] = {of_part + channel, of_part + channels + channel};
        const RmsCoefficients here = from(c, channel, place);
        rms_sum_gradients(images.kind, from(g_u, r, i), images.from(h, r, i), here, to, piece);
      });
    }
    if (!args.g_h) return;
    take_slopes(at, images, g_u, h, c, scratch);
    images.write(args.g_h, rows, scratch.tile(1), [&](const OutputRows& g_h) {  // g has been read
      rms_pull_back_rows(images.kind, g_u, h, c, g_h, rows);
    });
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
