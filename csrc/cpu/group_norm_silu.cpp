// group_norm_silu: y = act(GroupNorm(h + bias[c] + temb[n, c])), act = identity or SiLU, and its gradients.
//
// A group is read twice, the second time from the cache. bias and temb cost nothing per element: the statistics are
// those of each channel of h, and move with what is added to it. So an element of y is
//
//   act((h - offset[n, c]) scale[n, c] + beta[n, c])      offset = mean - bias - temb, scale = rstd weight
//
// A contiguous tensor is cut into groups, a channels_last one into runs of whole groups side by side. Sums are taken in
// an order that depends on the shape alone.
#include <cmath>

#include "group_norm_rows.h"

namespace ddpm_fast {
namespace {

// One channel, or one place, is both formats; then the one with the longer rows is taken.
bool is_across(const Shape& shape) { return shape.channels > 1 && (shape.channels_last || shape.inner == 1); }

// A run of whole groups of one sample.
struct Groups {
  int64_t n, first, count;
};

// What is worked on at a time: rows of a run of groups, from a channel (counted in the run) and a place on.
struct Piece {
  Rows rows;
  int64_t channel, place;
};
constexpr int64_t kPiece = 2048, kPlaces = 32;  // elements of a piece; places, where they are the rows
constexpr int64_t kKept = 128 * 1024;           // elements of which a thread keeps a value from one reading to the next

struct alignas(64) Block {
  float v[kPiece];
};

// Calls body(piece) for the pieces of `count` channels of sample n, from `first` on. Which places go together does not
// depend on how many channels there are, so neither do sums over them.
template <typename Body>
void for_each_piece(const Shape& shape, int64_t n, int64_t first, int64_t count, const Body& body) {
  const bool across = is_across(shape);
  const int64_t outer_size = across ? shape.inner : count, inner_size = across ? count : shape.inner;
  const int64_t stride = across ? shape.channels : shape.inner;
  const int64_t start = n * shape.elements() + first * (across ? 1 : shape.inner);
  const int64_t longest = across ? kPiece / kPlaces : std::min(inner_size, kPiece);
  const int64_t most = across ? kPlaces : kPiece / longest;
  for (int64_t outer = 0; outer < outer_size; outer += most) {
    for (int64_t inner = 0; inner < inner_size; inner += longest) {
      const int64_t rows = std::min(most, outer_size - outer), length = std::min(longest, inner_size - inner);
      const Rows part{start + outer * stride + inner, rows, length, stride};
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
  std::vector<float> g_u;  // of each element
  explicit Channels(int64_t count) {
    for (auto* values : {&offset, &scale, &beta, &shift, &base, &slope})
      values->assign(static_cast<size_t>(count), 0.0f);
    for (auto& values : sums)
      values.assign(static_cast<size_t>(count), 0.0);
  }
  void clear() {
    for (auto& values : sums)
      std::fill(values.begin(), values.end(), 0.0);
  }
  Coefficients from(int64_t c) const {
    return {offset.data() + c, scale.data() + c, beta.data() + c, base.data() + c, slope.data() + c};
  }
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

// A group's statistics, as results and as coefficients of its channels.
void set_group(
    const GroupNormSiluArgs& args, const Parameters& parameters, const Groups& run, int64_t group, double mean,
    double variance, Channels& channels
) {
  const double rstd = 1.0 / std::sqrt(variance + static_cast<double>(args.eps));
  args.mean[run.n * args.groups + group] = static_cast<float>(mean);
  args.rstd[run.n * args.groups + group] = static_cast<float>(rstd);
  set_coefficients(parameters, run, args.group_channels(), group, mean, rstd, channels);
}

// mean and variance of a group from the sums of its channels, each about its own shift
void set_statistics(
    const GroupNormSiluArgs& args, const Parameters& parameters, const Groups& run, int64_t group, Channels& channels
) {
  const int64_t width = args.group_channels();
  const double inner = static_cast<double>(args.shape.inner), inverse = 1.0 / inner;
  const size_t first = static_cast<size_t>((group - run.first) * width), last = first + static_cast<size_t>(width);
  double mean = 0.0, squares = 0.0;
  for (size_t k = first; k < last; ++k) {  // sums[0] becomes the mean of v, sums[1] the squares about it
    const double s = channels.sums[0][k] * inverse, own = channels.sums[1][k] - s * channels.sums[0][k];
    const double added = parameters.added(run.n, run.first * width + static_cast<int64_t>(k));
    channels.sums[0][k] = static_cast<double>(channels.shift[k]) + s + added;
    channels.sums[1][k] = own < 0.0 ? 0.0 : own;
    mean += channels.sums[0][k];
  }
  mean = mean / static_cast<double>(width);
  for (size_t k = first; k < last; ++k) {
    const double d = channels.sums[0][k] - mean;
    squares += channels.sums[1][k] + inner * d * d;
  }
  set_group(args, parameters, run, group, mean, squares * inverse / static_cast<double>(width), channels);
}

// Calls body(Groups, Channels) for all groups, in parallel. Small groups come several at a time. Groups side by side
// are at least a cache line wide, where there are so many channels, and small enough for the second reading to find
// them in the cache.
template <typename Body>
void for_each_groups(const GroupNormSiluArgs& args, int threads, const Body& body) {
  constexpr int64_t kLine = 64, kCached = 256 * 1024;  // bytes
  const Shape& shape = args.shape;
  if (shape.n <= 0 || shape.elements() <= 0) return;
  const int64_t elements = args.group_channels() * shape.inner;
  int64_t width = std::max<int64_t>(1, std::min(kPiece / elements, args.groups));  // groups
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
    Channels channels(width * args.group_channels());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % runs * width;
      channels.clear();
      body(Groups{i / runs, first, std::min(width, args.groups - first)}, channels);
    }
  });
}

// The sums of a piece about the means of its channels over their first 64 places.
void add_moments(const FloatRows& h, const Piece& piece, bool across, Channels& channels) {
  float* shift = channels.shift.data() + piece.channel;
  double* sums[] = {channels.sums[0].data() + piece.channel, channels.sums[1].data() + piece.channel};
  if (piece.place == 0) {
    Rows few = piece.rows;
    if (!across) few.length = std::min<int64_t>(few.length, 64);
    const int64_t count = across ? few.length : few.count;
    const float factor = 1.0f / static_cast<float>(across ? few.count : few.length);
    sum_values(h, sums, few, across);
    for (int64_t k = 0; k < count; ++k) {
      shift[k] = static_cast<float>(sums[0][k]) * factor;
      sums[0][k] = 0.0;
    }
  }
  sum_moments(h, shift, sums, piece.rows, across);
}

// Rows of few elements cost more than these do. Then a group, if it is one piece, is taken as one row of v, and
// coefficients are repeated for each element.
bool is_short(const GroupNormSiluArgs& args) {
  return !is_across(args.shape) && args.shape.inner <= 64 && args.group_channels() * args.shape.inner <= kPiece;
}

void short_group(
    const GroupNormSiluArgs& args, const Parameters& parameters, int64_t n, int64_t group, Channels& channels
) {
  const int64_t width = args.group_channels(), inner = args.shape.inner, size = width * inner;
  const Piece piece{{(n * args.groups + group) * size, 1, size, size}, 0, 0};
  Block a, b, c, d, e;
  const FloatRows h = load_rows(args.h, piece.rows, a.v);
  for (int64_t k = 0; k < width; ++k)
    channels.offset[static_cast<size_t>(k)] = static_cast<float>(parameters.added(n, group * width + k));
  add_to_channels(h.v, channels.offset.data(), width, inner, b.v);
  channels.sums[0][0] = channels.sums[1][0] = 0.0;
  add_moments({b.v, size}, piece, false, channels);
  const double s = channels.sums[0][0], count = static_cast<double>(size);
  const double squares = channels.sums[1][0] - s * s / count;
  const double mean = static_cast<double>(channels.shift[0]) + s / count;
  set_group(args, parameters, Groups{n, group, 1}, group, mean, (squares < 0.0 ? 0.0 : squares) / count, channels);
  repeat_for_channels(channels.offset.data(), width, inner, b.v);
  repeat_for_channels(channels.scale.data(), width, inner, c.v);
  repeat_for_channels(channels.beta.data(), width, inner, d.v);
  const StoreRows y = begin_store_rows(args.y, piece.rows, e.v);
  normalize_rows(h, {b.v, c.v, d.v, nullptr, nullptr}, y, piece.rows, true, args.silu);
  store_rows(args.y, piece.rows, y);
}

// After the sums over channels: the means that all elements of a group need, and the sums that are results.
void set_gradients(
    const GroupNormSiluArgs& args, const Parameters& parameters, const Groups& run, int64_t group, Channels& channels
) {
  const int64_t width = args.group_channels(), first_channel = run.n * args.shape.channels + run.first * width;
  const double inner = static_cast<double>(args.shape.inner), size = inner * static_cast<double>(width);
  const double rstd = static_cast<double>(args.rstd[run.n * args.groups + group]);
  const size_t first = static_cast<size_t>((group - run.first) * width), last = first + static_cast<size_t>(width);
  double of_g = 0.0, of_gx = 0.0;
  for (size_t k = first; k < last; ++k) {
    const int64_t c = run.first * width + static_cast<int64_t>(k);
    const double weight = static_cast<double>(parameters.weight(run.n, c));
    of_g += weight * channels.sums[0][k];
    of_gx += weight * channels.sums[1][k] * rstd;
  }
  const double base = rstd * of_g / size, slope = rstd * rstd * of_gx / size;
  for (size_t k = first; k < last; ++k) {
    channels.base[k] = static_cast<float>(base);
    channels.slope[k] = static_cast<float>(slope);
    const int64_t at = first_channel + static_cast<int64_t>(k);
    args.d_beta[at] = static_cast<float>(channels.sums[0][k]);
    args.d_weight[at] = static_cast<float>(rstd * channels.sums[1][k]);
    if (args.g_sum == nullptr) continue;
    const double scaled = static_cast<double>(channels.scale[k]) * channels.sums[0][k];
    args.g_sum[at] = static_cast<float>(scaled - (inner * base + slope * channels.sums[2][k]));
  }
}

}  // namespace

Status group_norm_silu_cpu(const GroupNormSiluArgs& args, int threads) {
  const Shape& shape = args.shape;
  const bool across = is_across(shape);
  const int64_t width = args.group_channels();
  const Parameters parameters(args);
  const bool in_short_groups = is_short(args);
  for_each_groups(args, threads, [&](const Groups& run, Channels& channels) {
    for (int64_t group = run.first; in_short_groups && group < run.first + run.count; ++group)
      short_group(args, parameters, run.n, group, channels);
    if (in_short_groups) return;
    Block a, b;
    for_each_piece(shape, run.n, run.first * width, run.count * width, [&](const Piece& piece) {
      const FloatRows h = load_rows(args.h, piece.rows, a.v);
      add_moments(h, piece, across, channels);
    });
    for (int64_t group = run.first; group < run.first + run.count; ++group)
      set_statistics(args, parameters, run, group, channels);
    for_each_piece(shape, run.n, run.first * width, run.count * width, [&](const Piece& piece) {
      const FloatRows h = load_rows(args.h, piece.rows, a.v);
      const StoreRows y = begin_store_rows(args.y, piece.rows, b.v);
      normalize_rows(h, channels.from(piece.channel), y, piece.rows, across, args.silu);
      store_rows(args.y, piece.rows, y);
    });
  });
  return {};
}

Status group_norm_silu_backward_cpu(const GroupNormSiluArgs& args, int threads) {
  const Shape& shape = args.shape;
  const bool across = is_across(shape);
  const int64_t width = args.group_channels();
  const Parameters parameters(args);
  for_each_groups(args, threads, [&](const Groups& run, Channels& channels) {
    for (int64_t group = run.first; group < run.first + run.count; ++group) {
      const int64_t at = run.n * args.groups + group;
      const double mean = static_cast<double>(args.mean[at]), rstd = static_cast<double>(args.rstd[at]);
      set_coefficients(parameters, run, width, group, mean, rstd, channels);
    }
    Block a, b, c, d;
    // The derivative of SiLU is not computed twice where the cache can hold what it gave.
    const int64_t elements = run.count * width * shape.inner;
    const bool kept = args.silu && args.g_h && elements <= kKept;
    if (kept) channels.g_u.resize(static_cast<size_t>(elements));
    // Calls body(piece, g_u, h) for all pieces.
    const auto for_each_gradient = [&](bool again, const auto& body) {
      float* next = kept ? channels.g_u.data() : c.v;
      for_each_piece(shape, run.n, run.first * width, run.count * width, [&](const Piece& piece) {
        const FloatRows h = load_rows(args.h, piece.rows, a.v), packed{next, piece.rows.length};
        const bool computes = args.silu && !(kept && again);
        const FloatRows g = args.silu && !computes ? packed : load_rows(args.g, piece.rows, b.v);
        if (computes) activation_gradient_rows(g, h, channels.from(piece.channel), next, piece.rows, across);
        if (kept) next += piece.rows.count * piece.rows.length;
        body(piece, args.silu ? packed : g, h);
      });
    };
    for_each_gradient(false, [&](const Piece& piece, const FloatRows& g_u, const FloatRows& h) {
      double* sums[3];
      for (int k = 0; k < 3; ++k)
        sums[k] = channels.sums[k].data() + piece.channel;
      sum_gradients(g_u, h, channels.offset.data() + piece.channel, sums, piece.rows, across);
    });
    for (int64_t group = run.first; group < run.first + run.count; ++group)
      set_gradients(args, parameters, run, group, channels);
    if (!args.g_h) return;
    for_each_gradient(true, [&](const Piece& piece, const FloatRows& g_u, const FloatRows& h) {
      const StoreRows g_h = begin_store_rows(args.g_h, piece.rows, d.v);
      pull_back_rows(g_u, h, channels.from(piece.channel), g_h, piece.rows, across);
      store_rows(args.g_h, piece.rows, g_h);
    });
  });
  return {};
}

}  // namespace ddpm_fast
