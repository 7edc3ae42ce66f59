// group_norm_silu: y = act(GroupNorm(h + bias[c] + temb[n, c])), act = identity or SiLU, and its gradients.
//
// A group is read twice, the second time from the cache. bias and temb cost nothing per element: the statistics are
// those of each channel of h, and move with what is added to it. So an element of y is
//
//   act((h - offset[n, c]) scale[n, c] + beta[n, c])      offset = mean - bias - temb, scale = rstd weight
//
// A contiguous tensor is cut into groups, a channels_last one into runs of whole groups side by side. Sums are taken in
// float64, in an order that depends on the shape alone.
#include <cmath>
#include <limits>

#include "tile.h"

namespace ddpm_fast {
namespace {

// ---- rows: of one channel each (contiguous), or of one place each (kAcross), along which coefficients are vectors
// ----

struct Coefficients {
  const float *offset, *scale, *beta;
};

template <bool kAcross, bool kSilu>
DDPM_FAST_HD void normalize(
    const float* h, int64_t h_stride, const Coefficients& c, float* __restrict__ y, int64_t y_stride, int64_t rows,
    int64_t length
) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* in = h + r * h_stride;
    float* __restrict__ out = y + r * y_stride;
    for (int64_t i = 0; i < length; ++i) {
      const int64_t k = kAcross ? i : r;
      const float u = (in[i] - c.offset[k]) * c.scale[k] + c.beta[k];
      out[i] = kSilu ? silu(u) : u;
    }
  }
}

template <bool kAcross>
DDPM_FAST_HD void activation_gradient(
    const float* g, int64_t g_stride, const float* h, int64_t h_stride, const Coefficients& c, float* __restrict__ g_u,
    int64_t rows, int64_t length
) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < length; ++i) {
      const int64_t k = kAcross ? i : r;
      const float u = (h[r * h_stride + i] - c.offset[k]) * c.scale[k] + c.beta[k];
      g_u[r * length + i] = g[r * g_stride + i] * silu_grad(u);
    }
  }
}

// g_h = rstd (g_x - mean(g_x) - xhat mean(g_x xhat)), the means in `base` and `slope`.
template <bool kAcross>
DDPM_FAST_HD void pull_back(
    const float* g_u, int64_t g_stride, const float* h, int64_t h_stride, const Coefficients& c, const float* base,
    const float* slope, float* __restrict__ g_h, int64_t out_stride, int64_t rows, int64_t length
) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < length; ++i) {
      const int64_t k = kAcross ? i : r;
      const float d = h[r * h_stride + i] - c.offset[k];
      g_h[r * out_stride + i] = g_u[r * g_stride + i] * c.scale[k] - (base[k] + d * slope[k]);
    }
  }
}

// ---- sums ----

constexpr int kLanes = 16;

DDPM_FAST_HD double total_of(double* lanes) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j)
      lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

// What is summed of each element, in float64: kSums values put into `to`.
struct Moments {  // of h about a value near it, so that their difference loses nothing
  static constexpr int kSums = 2;
  const float* h;
  int64_t stride;
  const float* shift;
  DDPM_FAST_HD void add(double* to, int64_t lanes, int64_t r, int64_t i, int64_t k) const {
    const double d = static_cast<double>(h[r * stride + i]) - static_cast<double>(shift[k]);
    to[0] += d;
    to[lanes] += d * d;
  }
};
struct GradientSums {  // g_u, g_u d and d, with d = h - offset
  static constexpr int kSums = 3;
  const float* g_u;
  int64_t g_stride;
  const float* h;
  int64_t stride;
  const float* offset;
  DDPM_FAST_HD void add(double* to, int64_t lanes, int64_t r, int64_t i, int64_t k) const {
    const double g = static_cast<double>(g_u[r * g_stride + i]);
    const double d = static_cast<double>(h[r * stride + i] - offset[k]);
    to[0] += g;
    to[lanes] += g * d;
    to[2 * lanes] += d;
  }
};

// sums[k][row] += the sums over each row
template <typename Terms>
DDPM_FAST_HD void sum_along(const Terms& terms, double* const* sums, int64_t rows, int64_t length) {
  for (int64_t r = 0; r < rows; ++r) {
    double lanes[Terms::kSums * kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= length; i += kLanes) {
      for (int j = 0; j < kLanes; ++j)
        terms.add(lanes + j, kLanes, r, i + j, r);
    }
    for (int j = 0; i + j < length; ++j)
      terms.add(lanes + j, kLanes, r, i + j, r);
    for (int k = 0; k < Terms::kSums; ++k)
      sums[k][r] += total_of(lanes + k * kLanes);
  }
}

// sums[k][column] += the sums over each column, from the first row to the last
template <typename Terms>
DDPM_FAST_HD void sum_across(const Terms& terms, double* const* sums, int64_t rows, int64_t length) {
  for (int64_t first = 0; first < length; first += kLanes) {
    const int64_t width = std::min<int64_t>(kLanes, length - first);
    double lanes[Terms::kSums * kLanes] = {};
    for (int k = 0; k < Terms::kSums; ++k)
      std::copy_n(sums[k] + first, width, lanes + k * kLanes);
    if (width == kLanes) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int j = 0; j < kLanes; ++j)
          terms.add(lanes + j, kLanes, r, first + j, first + j);
      }
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < width; ++j)
          terms.add(lanes + j, kLanes, r, first + j, first + j);
      }
    }
    for (int k = 0; k < Terms::kSums; ++k)
      std::copy_n(lanes + k * kLanes, width, sums[k] + first);
  }
}

// ---- the loops above, once per instruction set ----

DDPM_FAST_CLONES void normalize_rows(
    const FloatRows& h, const Coefficients& c, const StoreRows& y, int64_t rows, int64_t length, bool across, bool silu
) {
  if (across && silu) return normalize<true, true>(h.v, h.stride, c, y.v, y.stride, rows, length);
  if (across) return normalize<true, false>(h.v, h.stride, c, y.v, y.stride, rows, length);
  if (silu) return normalize<false, true>(h.v, h.stride, c, y.v, y.stride, rows, length);
  normalize<false, false>(h.v, h.stride, c, y.v, y.stride, rows, length);
}

DDPM_FAST_CLONES void activation_gradient_rows(
    const FloatRows& g, const FloatRows& h, const Coefficients& c, float* g_u, int64_t rows, int64_t length, bool across
) {
  if (across) return activation_gradient<true>(g.v, g.stride, h.v, h.stride, c, g_u, rows, length);
  activation_gradient<false>(g.v, g.stride, h.v, h.stride, c, g_u, rows, length);
}

DDPM_FAST_CLONES void pull_back_rows(
    const FloatRows& g_u, const FloatRows& h, const Coefficients& c, const float* base, const float* slope,
    const StoreRows& g_h, int64_t rows, int64_t length, bool across
) {
  if (across) {
    pull_back<true>(g_u.v, g_u.stride, h.v, h.stride, c, base, slope, g_h.v, g_h.stride, rows, length);
  } else {
    pull_back<false>(g_u.v, g_u.stride, h.v, h.stride, c, base, slope, g_h.v, g_h.stride, rows, length);
  }
}

DDPM_FAST_CLONES void
sum_moments(const Moments& terms, double* const* sums, int64_t rows, int64_t length, bool across) {
  across ? sum_across(terms, sums, rows, length) : sum_along(terms, sums, rows, length);
}

DDPM_FAST_CLONES void
sum_gradients(const GradientSums& terms, double* const* sums, int64_t rows, int64_t length, bool across) {
  across ? sum_across(terms, sums, rows, length) : sum_along(terms, sums, rows, length);
}

// ---- tasks ----

// One channel, or one place, is both formats; then the one with the longer rows is taken.
bool is_across(const Shape& shape) { return shape.channels > 1 && (shape.channels_last || shape.inner == 1); }

// A run of whole groups of one sample.
struct Groups {
  int64_t n, first, count;
};

// Calls body(Groups) for all groups, in parallel. Side by side groups are at least a cache line wide, where there are
// so many channels, and together small enough for the second reading to find them in the cache.
template <typename Body>
void for_each_groups(const GroupNormSiluArgs& args, int threads, const Body& body) {
  constexpr int64_t kLine = 64, kCached = 256 * 1024;  // bytes
  const Shape& shape = args.shape;
  if (shape.n <= 0 || shape.elements() <= 0) return;
  int64_t width = 1;  // groups
  if (is_across(shape)) {
    const int64_t bytes = args.h.dtype == DType::f32 ? 4 : 2;
    const int64_t for_cache = (shape.elements() * bytes + kCached - 1) / kCached;
    const int64_t for_threads = (threads + shape.n - 1) / shape.n;
    const int64_t runs = std::min(std::max(for_cache, for_threads), args.groups);
    const int64_t line = std::max<int64_t>(1, kLine / (bytes * args.group_channels()));
    width = std::min(std::max((args.groups + runs - 1) / runs, line), args.groups);
  }
  const int64_t runs = (args.groups + width - 1) / width;
  parallel_for(shape.n * runs, useful_threads(shape.n * shape.elements(), threads), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % runs * width;
      body(Groups{i / runs, first, std::min(width, args.groups - first)});
    }
  });
}

// Rows of at most a tile of a run of groups, and their first channel (counted in the run) and place.
struct Piece {
  Rows rows;
  int64_t channel, place;
};

// Calls body(piece) for the pieces of the channels [first, first + count) of sample n.
template <typename Body>
void for_each_piece(const Shape& shape, int64_t n, int64_t first, int64_t count, const Body& body) {
  const bool across = is_across(shape);
  const int64_t outer_size = across ? shape.inner : count, inner_size = across ? count : shape.inner;
  const int64_t outer_stride = across ? shape.channels : shape.inner;
  const int64_t start = n * shape.elements() + first * (across ? 1 : shape.inner);
  const int64_t length = std::min(inner_size, kTile), rows = kTile / length;
  for (int64_t outer = 0; outer < outer_size; outer += rows) {
    for (int64_t inner = 0; inner < inner_size; inner += length) {
      const Rows part{
          start + outer * outer_stride + inner, std::min(rows, outer_size - outer),
          std::min(length, inner_size - inner), outer_stride
      };
      body(across ? Piece{part, inner, outer} : Piece{part, outer, inner});
    }
  }
}

// bias + temb, weight and beta as numbers for each sample and channel.
class Parameters {
 public:
  explicit Parameters(const GroupNormSiluArgs& args)
      : channels_(args.shape.channels), weight_rows_(args.weight_per_sample), beta_rows_(args.beta_per_sample),
        bias_(as_floats(args.bias, channels_, 0.0f)),
        temb_(as_floats(args.temb, args.temb ? args.shape.n * channels_ : 0, 0.0f)),
        weight_(as_floats(args.weight, weight_rows_ ? args.shape.n * channels_ : channels_, 1.0f)),
        beta_(as_floats(args.beta, beta_rows_ ? args.shape.n * channels_ : channels_, -0.0f)) {}
  double added(int64_t n, int64_t c) const {
    const double temb = temb_.empty() ? 0.0 : static_cast<double>(temb_[at(n, c, true)]);
    return static_cast<double>(bias_[at(n, c, false)]) + temb;
  }
  float weight(int64_t n, int64_t c) const { return weight_[at(n, c, weight_rows_)]; }
  float beta(int64_t n, int64_t c) const { return beta_[at(n, c, beta_rows_)]; }

 private:
  size_t at(int64_t n, int64_t c, bool per_sample) const {
    return static_cast<size_t>(per_sample ? n * channels_ + c : c);
  }
  int64_t channels_;
  bool weight_rows_, beta_rows_;
  std::vector<float> bias_, temb_, weight_, beta_;
};

// Per channel of a run of groups.
struct Channels {
  std::vector<float> offset, scale, beta, shift, base, slope;
  std::vector<double> sums[3];
  explicit Channels(int64_t count) {
    for (auto* values : {&offset, &scale, &beta, &shift, &base, &slope})
      values->assign(static_cast<size_t>(count), 0.0f);
    for (auto& values : sums)
      values.assign(static_cast<size_t>(count), 0.0);
  }
  Coefficients from(int64_t c) const { return {offset.data() + c, scale.data() + c, beta.data() + c}; }
};

void set_coefficients(
    const Parameters& parameters, const Groups& run, int64_t width, int64_t group, double mean, double rstd,
    Channels& to
) {
  for (int64_t k = (group - run.first) * width, c = group * width; c < (group + 1) * width; ++c, ++k) {
    const size_t i = static_cast<size_t>(k);
    to.offset[i] = static_cast<float>(mean - parameters.added(run.n, c));
    to.scale[i] = static_cast<float>(rstd * static_cast<double>(parameters.weight(run.n, c)));
    to.beta[i] = parameters.beta(run.n, c);
  }
}

// mean and variance of a group from the sums of its channels, each about its own shift
void set_statistics(
    const GroupNormSiluArgs& args, const Parameters& parameters, const Groups& run, int64_t group, Channels& channels
) {
  const int64_t width = args.group_channels();
  const double inner = static_cast<double>(args.shape.inner);
  const auto channel_mean = [&](int64_t c) {  // of v
    const size_t k = static_cast<size_t>(c - run.first * width);
    return static_cast<double>(channels.shift[k]) + channels.sums[0][k] / inner + parameters.added(run.n, c);
  };
  double mean = 0.0, squares = 0.0;
  for (int64_t c = group * width; c < (group + 1) * width; ++c)
    mean += channel_mean(c) / static_cast<double>(width);
  for (int64_t c = group * width; c < (group + 1) * width; ++c) {
    const size_t k = static_cast<size_t>(c - run.first * width);
    const double s = channels.sums[0][k], d = channel_mean(c) - mean;
    const double own = channels.sums[1][k] - s * s / inner;
    squares += (own < 0.0 ? 0.0 : own) + inner * d * d;
  }
  const double variance = squares / (inner * static_cast<double>(width));
  const double rstd = 1.0 / std::sqrt(variance + static_cast<double>(args.eps));
  args.mean[run.n * args.groups + group] = static_cast<float>(mean);
  args.rstd[run.n * args.groups + group] = static_cast<float>(rstd);
  set_coefficients(parameters, run, width, group, mean, rstd, channels);
}

}  // namespace

Status group_norm_silu_cpu(const GroupNormSiluArgs& args, int threads) {
  const Shape& shape = args.shape;
  const bool across = is_across(shape);
  const int64_t width = args.group_channels();
  const Parameters parameters(args);
  for_each_groups(args, threads, [&](const Groups& run) {
    Channels channels(run.count * width);
    Tile a, b;
    for_each_piece(shape, run.n, run.first * width, run.count * width, [&](const Piece& piece) {
      const FloatRows h = load_rows(args.h, piece.rows, a);
      if (piece.place == 0) {  // the first of each channel
        for (int64_t k = 0; k < (across ? piece.rows.length : piece.rows.count); ++k)
          channels.shift[static_cast<size_t>(piece.channel + k)] = across ? h.v[k] : h.v[k * h.stride];
      }
      double* sums[] = {channels.sums[0].data() + piece.channel, channels.sums[1].data() + piece.channel};
      const Moments terms{h.v, h.stride, channels.shift.data() + piece.channel};
      sum_moments(terms, sums, piece.rows.count, piece.rows.length, across);
    });
    for (int64_t group = run.first; group < run.first + run.count; ++group)
      set_statistics(args, parameters, run, group, channels);
    for_each_piece(shape, run.n, run.first * width, run.count * width, [&](const Piece& piece) {
      const FloatRows h = load_rows(args.h, piece.rows, a);
      const StoreRows y = begin_store_rows(args.y, piece.rows, b);
      const Coefficients coefficients = channels.from(piece.channel);
      normalize_rows(h, coefficients, y, piece.rows.count, piece.rows.length, across, args.silu);
      store_rows(args.y, piece.rows, y);
    });
  });
  return {};
}

Status group_norm_silu_backward_cpu(const GroupNormSiluArgs& args, int threads) {
  const Shape& shape = args.shape;
  const bool across = is_across(shape);
  const int64_t width = args.group_channels();
  const double inner = static_cast<double>(shape.inner), size = inner * static_cast<double>(width);
  const Parameters parameters(args);
  for_each_groups(args, threads, [&](const Groups& run) {
    Channels channels(run.count * width);
    const auto rstd_of = [&](int64_t group) { return static_cast<double>(args.rstd[run.n * args.groups + group]); };
    for (int64_t group = run.first; group < run.first + run.count; ++group) {
      const double mean = static_cast<double>(args.mean[run.n * args.groups + group]);
      set_coefficients(parameters, run, width, group, mean, rstd_of(group), channels);
    }
    Tile a, b, c, d;
    // Calls body(piece, g_u, h) for all pieces, with g_u = g act'(u).
    const auto for_each_gradient = [&](const auto& body) {
      for_each_piece(shape, run.n, run.first * width, run.count * width, [&](const Piece& piece) {
        const FloatRows h = load_rows(args.h, piece.rows, a);
        FloatRows g_u = load_rows(args.g, piece.rows, b);
        if (args.silu) {
          const Coefficients coefficients = channels.from(piece.channel);
          activation_gradient_rows(g_u, h, coefficients, c.v, piece.rows.count, piece.rows.length, across);
          g_u = {c.v, piece.rows.length};
        }
        body(piece, g_u, h);
      });
    };
    for_each_gradient([&](const Piece& piece, const FloatRows& g_u, const FloatRows& h) {
      double* sums[3];
      for (int k = 0; k < 3; ++k)
        sums[k] = channels.sums[k].data() + piece.channel;
      const GradientSums terms{g_u.v, g_u.stride, h.v, h.stride, channels.offset.data() + piece.channel};
      sum_gradients(terms, sums, piece.rows.count, piece.rows.length, across);
    });
    for (int64_t group = run.first; group < run.first + run.count; ++group) {
      const double rstd = rstd_of(group);
      const size_t first = static_cast<size_t>((group - run.first) * width);
      double of_g = 0.0, of_gx = 0.0;  // sums over the group of g_x and g_x xhat, g_x = g_u weight
      for (size_t k = first; k < first + static_cast<size_t>(width); ++k) {
        const double weight =
            static_cast<double>(parameters.weight(run.n, run.first * width + static_cast<int64_t>(k)));
        of_g += weight * channels.sums[0][k];
        of_gx += weight * channels.sums[1][k] * rstd;
      }
      const double base = rstd * of_g / size, slope = rstd * rstd * of_gx / size;
      for (size_t k = first; k < first + static_cast<size_t>(width); ++k) {
        channels.base[k] = static_cast<float>(base);
        channels.slope[k] = static_cast<float>(slope);
        const int64_t at = run.n * shape.channels + run.first * width + static_cast<int64_t>(k);
        args.d_beta[at] = static_cast<float>(channels.sums[0][k]);
        args.d_weight[at] = static_cast<float>(rstd * channels.sums[1][k]);
        if (args.g_sum == nullptr) continue;
        const double scaled = static_cast<double>(channels.scale[k]) * channels.sums[0][k];
        args.g_sum[at] = static_cast<float>(scaled - (inner * base + slope * channels.sums[2][k]));
      }
    }
    if (!args.g_h) return;
    for_each_gradient([&](const Piece& piece, const FloatRows& g_u, const FloatRows& h) {
      const StoreRows g_h = begin_store_rows(args.g_h, piece.rows, d);
      const float *base = channels.base.data() + piece.channel, *slope = channels.slope.data() + piece.channel;
      const Coefficients coefficients = channels.from(piece.channel);
      pull_back_rows(g_u, h, coefficients, base, slope, g_h, piece.rows.count, piece.rows.length, across);
      store_rows(args.g_h, piece.rows, g_h);
    });
  });
  return {};
}

}  // namespace ddpm_fast
