// add_bias_temb: y = act(h + bias[c]) + temb[n, c], act = identity or SiLU, and its gradients.
//
// There is no noise here, so memory order is the natural order. A contiguous tensor is cut into "rows" of one (n, c)
// with scalar bias and temb; a channels_last one into rows of one (n, place), along which bias and temb are vectors.
#include <vector>

#include "tile.h"

namespace ddpm_fast {
namespace {

// A missing bias or temb is -0: the one number whose addition changes no float, zeros of either sign included.
constexpr float kNothing = -0.0f;

Shape flat(int64_t elements) { return Shape{1, 1, elements, false}; }

// Rows with one bias and one temb (contiguous), and rows along which they are vectors (channels_last).
DDPM_FAST_CLONES void add_row(const float* h, float bias, float temb, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    y[i] = (h[i] + bias) + temb;
}
DDPM_FAST_CLONES void add_row(const float* h, const float* bias, const float* temb, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    y[i] = (h[i] + bias[i]) + temb[i];
}
DDPM_FAST_CLONES void silu_row(const float* h, float bias, float temb, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    y[i] = silu(h[i] + bias) + temb;
}
DDPM_FAST_CLONES void silu_row(const float* h, const float* bias, const float* temb, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    y[i] = silu(h[i] + bias[i]) + temb[i];
}
DDPM_FAST_CLONES void silu_grad_row(const float* g, const float* h, const float* bias, float* gh, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    gh[i] = g[i] * silu_grad(h[i] + bias[i]);
}
DDPM_FAST_CLONES void accumulate(const float* a, double* sums, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    sums[i] += static_cast<double>(a[i]);
}
// Calls body(at, length, offset in the tile, row) for the pieces of rows of `length` elements in a tile from `first`
// on.
template <typename Body>
void for_each_row_piece(int64_t length, int64_t first, int64_t count, const Body& body) {
  int64_t row = first / length;
  int64_t place = first % length;
  for (int64_t done = 0; done < count; ++row, place = 0) {
    const int64_t piece = std::min(count - done, length - place);
    body(row, place, done, piece);
    done += piece;
  }
}

// Rows shorter than this are gathered into a tile, because a call for a few elements costs more than they do.
constexpr int64_t kShortRow = 128;

int64_t row_length(const Shape& shape) { return shape.channels_last ? shape.channels : shape.inner; }

// values[c] over and over, so that a tile of a channels_last tensor finds those of its elements at one address.
class Repeated {
 public:
  Repeated() = default;
  Repeated(const float* values, int64_t channels, bool wanted) : channels_(channels) {
    if (!wanted) return;
    all_.resize(static_cast<size_t>(kTile + channels));
    for (int64_t i = 0; i < kTile + channels; i += channels) {
      std::copy_n(values, std::min(channels, kTile + channels - i), all_.begin() + i);
    }
  }
  const float* from(int64_t first) const { return all_.data() + first % channels_; }

 private:
  int64_t channels_ = 1;
  std::vector<float> all_;
};

// values[c] of the channel of each element of a run.
const float* per_element(const Shape& shape, const float* values, const Run& run, Tile& scratch) {
  for_each_row_piece(row_length(shape), run.first, run.count, [&](int64_t row, int64_t at, int64_t i, int64_t count) {
    if (shape.channels_last) {
      std::copy_n(values + at, count, scratch.v + i);
    } else {
      std::fill_n(scratch.v + i, count, values[row]);
    }
  });
  return scratch.v;
}

// sums[c] += what the elements of a tile have in channel c.
void sum_per_channel(const Shape& shape, int64_t first, const float* in, double* sums, int64_t count) {
  if (shape.channels_last) {
    for_each_row_piece(shape.channels, first, count, [&](int64_t, int64_t c, int64_t i, int64_t piece) {
      accumulate(in + i, sums + c, piece);
    });
  } else {
    for_each_row_piece(shape.inner, first, count, [&](int64_t c, int64_t, int64_t i, int64_t piece) {
      sums[c] += sum_of(in + i, piece);
    });
  }
}

}  // namespace

Status add_bias_temb_cpu(const AddBiasTembArgs& args, int threads) {
  const Shape& shape = args.shape;
  const std::vector<float> bias = as_floats(args.bias, shape.channels, kNothing);
  const std::vector<float> temb = as_floats(args.temb, shape.n * shape.channels, kNothing);
  const bool short_rows = row_length(shape) < kShortRow;
  const Repeated bias_rows(bias.data(), shape.channels, short_rows && shape.channels_last);
  const int64_t tiles = (shape.elements() + kTile - 1) / kTile;
  parallel_for(shape.n * tiles, useful_threads(shape.n * shape.elements(), threads), [&](int64_t begin, int64_t end) {
    Repeated temb_rows;
    int64_t sample = -1;  // whose temb_rows these are
    for (int64_t i = begin; i < end; ++i) {
      Tile a, b, c, d;
      const int64_t n = i / tiles, first = i % tiles * kTile;
      const Run place{0, n * shape.elements() + first, std::min(kTile, shape.elements() - first)};
      const float* h = load(args.h, flat(0), place, a);
      const float* t = temb.data() + n * shape.channels;
      float* y = begin_store(args.y, flat(0), place, b);
      if (short_rows) {
        const Run run{n, first, place.count};
        if (shape.channels_last && sample != n) {
          temb_rows = Repeated(t, shape.channels, true);
          sample = n;
        }
        const float* bias_of = shape.channels_last ? bias_rows.from(first) : per_element(shape, bias.data(), run, c);
        const float* temb_of = shape.channels_last ? temb_rows.from(first) : per_element(shape, t, run, d);
        args.silu ? silu_row(h, bias_of, temb_of, y, run.count) : add_row(h, bias_of, temb_of, y, run.count);
      } else {
        for_each_row_piece(
            row_length(shape), first, place.count, [&](int64_t row, int64_t at, int64_t k, int64_t count) {
              if (shape.channels_last) {
                const float* b_c = bias.data() + at;
                args.silu ? silu_row(h + k, b_c, t + at, y + k, count) : add_row(h + k, b_c, t + at, y + k, count);
              } else {
                const float b_c = bias[static_cast<size_t>(row)];
                args.silu ? silu_row(h + k, b_c, t[row], y + k, count) : add_row(h + k, b_c, t[row], y + k, count);
              }
            }
        );
      }
      store(args.y, flat(0), place, y);
    }
  });
  return {};
}

// One sample is one task: its sums then need no second pass, and a training batch has samples enough.
Status add_bias_temb_backward_cpu(const AddBiasTembBackwardArgs& args, int threads) {
  const Shape& shape = args.shape;
  const std::vector<float> bias = as_floats(args.bias, shape.channels, kNothing);
  const int64_t elements = shape.elements();
  const size_t channels = static_cast<size_t>(shape.channels);
  const Repeated bias_rows(bias.data(), shape.channels, args.silu && shape.channels_last);
  parallel_for(shape.n, useful_threads(shape.n * elements, threads), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      std::vector<double> g_sum(channels, 0.0), gh_sum(channels, 0.0);
      for (int64_t first = 0; first < elements; first += kTile) {
        Tile a, b, c;
        const Run run{0, n * elements + first, std::min(kTile, elements - first)};
        const float* g = load(args.g, flat(0), run, a);
        if (args.g_sum != nullptr) sum_per_channel(shape, first, g, g_sum.data(), run.count);
        if (!args.g_h && args.gh_sum == nullptr) continue;
        const float* gh = g;
        if (args.silu) {
          const float* h = load(args.h, flat(0), run, b);
          float* out = args.g_h ? begin_store(args.g_h, flat(0), run, c) : c.v;
          Tile d;
          const float* bias_of = shape.channels_last ? bias_rows.from(first)
                                                     : per_element(shape, bias.data(), Run{n, first, run.count}, d);
          silu_grad_row(g, h, bias_of, out, run.count);
          gh = out;
        }
        if (args.gh_sum != nullptr) sum_per_channel(shape, first, gh, gh_sum.data(), run.count);
        if (args.g_h) store(args.g_h, flat(0), run, gh);
      }
      for (size_t c = 0; c < channels; ++c) {
        const size_t at = static_cast<size_t>(n) * channels + c;
        if (args.g_sum != nullptr) args.g_sum[at] = static_cast<float>(g_sum[c]);
        if (args.gh_sum != nullptr) args.gh_sum[at] = static_cast<float>(gh_sum[c]);
      }
    }
  });
  return {};
}

}  // namespace ddpm_fast
