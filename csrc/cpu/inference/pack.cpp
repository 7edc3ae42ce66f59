// Transforming and packing weights, once per compiled layer.
#include "pack.h"

#include <cstring>
#include <map>
#include <stdexcept>

#include "../../dispatch.h"
#include "../parallel.h"
#include "isa.h"

namespace ddpm_fast::inference {
namespace {

// t = left w right^T for a 3x3 kernel w and the same `rows` x 3 matrix on both sides, in float64.
template <int rows>
void transformed(const double (&matrix)[rows][3], const float* w, double* t) {
  double half[rows][3];
  for (int i = 0; i < rows; ++i)
    for (int x = 0; x < 3; ++x)
      half[i][x] = matrix[i][0] * w[x] + matrix[i][1] * w[3 + x] + matrix[i][2] * w[6 + x];
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < rows; ++j)
      t[i * rows + j] = half[i][0] * matrix[j][0] + half[i][1] * matrix[j][1] + half[i][2] * matrix[j][2];
}

constexpr double kWinogradTaps[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
constexpr double kWindowTaps[3][3] = {{0, 1, 0}, {0, -1, 1}, {1, -1, 0}};
constexpr double kDoubledTaps[3][3] = {{1, 0, 0}, {1, 1, 1}, {0, 0, 1}};

// The weights of input channel (or k) `k` and column `column` at every position.
void weights_at(
    Kind kind, const float* weight, int64_t out_channels, int64_t in_channels, int64_t k, int64_t column, double* t
) {
  switch (kind) {
  case Kind::winograd: return transformed(kWinogradTaps, weight + (column * in_channels + k) * 9, t);
  case Kind::window: return transformed(kWindowTaps, weight + (column * in_channels + k) * 9, t);
  case Kind::doubled: return transformed(kDoubledTaps, weight + (column * in_channels + k) * 9, t);
  case Kind::direct:
  case Kind::strided:
  case Kind::output3x3:
    for (int tap = 0; tap < 9; ++tap)
      t[tap] = column < out_channels ? weight[(column * in_channels + k) * 9 + tap] : 0.0;
    return;
  case Kind::point: t[0] = weight[(column * in_channels + k) * 9 + 4]; return;
  case Kind::first: t[0] = weight[column * in_channels * 9 + k]; return;
  case Kind::first7x7:
    for (int ky = 0; ky < 7; ++ky)
      t[ky] =
          k < 7 * in_channels ? weight[((column * in_channels + k % in_channels) * 7 + ky) * 7 + k / in_channels] : 0.0;
    return;
  case Kind::down:
    for (int tap = 0; tap < 4; ++tap)
      t[tap] = weight[(column * in_channels + k) * 4 + tap];
    return;
  case Kind::up: t[0] = weight[(k * out_channels + column % out_channels) * 4 + column / out_channels]; return;
  case Kind::linear:
  case Kind::output: t[0] = column < out_channels ? weight[column * in_channels + k] : 0.0; return;
  }
}

}  // namespace

Kind kind_named(const std::string& name) {
  static const std::map<std::string, Kind> kinds = {
      {"winograd", Kind::winograd},   {"direct", Kind::direct}, {"strided", Kind::strided}, {"doubled", Kind::doubled},
      {"window", Kind::window},       {"point", Kind::point},   {"linear", Kind::linear},   {"first", Kind::first},
      {"first7x7", Kind::first7x7},   {"up", Kind::up},         {"down", Kind::down},       {"output", Kind::output},
      {"output3x3", Kind::output3x3},
  };
  const auto found = kinds.find(name);
  if (found == kinds.end()) {
    std::string known;
    for (const auto& kind : kinds)
      known += (known.empty() ? "" : ", ") + kind.first;
    throw std::invalid_argument("kind must be one of " + known + ", got '" + name + "'");
  }
  return found->second;
}

Packing::Packing(Kind kind, const Kernels& kernels, int64_t out_channels, int64_t in_channels) {
  const bool image = kind == Kind::first || kind == Kind::first7x7;
  const bool last = kind == Kind::output || kind == Kind::output3x3;
  if (out_channels < 1 || in_channels < 1 || (!last && out_channels % kPanel) || (!image && in_channels % kPanel))
    throw std::invalid_argument(
        "channels must be multiples of 16 (the image's aside), got " + std::to_string(in_channels) + " -> " +
        std::to_string(out_channels)
    );
  const Kernels& table = kind == Kind::first || last ? float_kernels(kernels) : kernels;
  half = table.half;
  switch (kind) {
  case Kind::winograd: positions = 16; break;
  case Kind::first7x7: positions = 7; break;
  case Kind::down: positions = 4; break;
  case Kind::window:
  case Kind::doubled:
  case Kind::direct:
  case Kind::strided:
  case Kind::output3x3: positions = 9; break;
  default: positions = 1;
  }
  k = kind == Kind::first ? 9 * in_channels : in_channels;
  if (kind == Kind::first7x7) k = half ? (7 * in_channels + 1) / 2 * 2 : 7 * in_channels;
  k_padded = (k + table.k_multiple - 1) / table.k_multiple * table.k_multiple;
  columns = kind == Kind::up ? 4 * out_channels : (out_channels + kPanel - 1) / kPanel * kPanel;
  const int64_t panels = columns / kPanel, count = (panels + kGroupPanels - 1) / kGroupPanels;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = panels * i / count, size = panels * (i + 1) / count - first;
    groups.push_back({first, size, elements});
    elements += positions * k_padded * size * kPanel;
  }
}

void pack(
    Kind kind, const Kernels& kernels, int64_t out_channels, int64_t in_channels, const float* weight, void* packed,
    int threads
) {
  const Packing p(kind, kernels, out_channels, in_channels);
  std::memset(packed, 0, static_cast<size_t>(p.bytes()));
  parallel_for(static_cast<int64_t>(p.groups.size()), threads, [&](int64_t begin, int64_t end) {
    double t[16];
    for (int64_t i = begin; i < end; ++i) {
      const Group& group = p.groups[static_cast<size_t>(i)];
      const int64_t width = group.panels * kPanel, step = p.position_elements(group);
      for (int64_t j = 0; j < width; ++j)
        for (int64_t k = 0; k < p.k; ++k) {
          weights_at(kind, weight, out_channels, in_channels, k, group.first_panel * kPanel + j, t);
          const int64_t at = group.offset + (p.half ? (k / 2 * width + j) * 2 + k % 2 : k * width + j);
          for (int64_t position = 0; position < p.positions; ++position) {
            const float value = static_cast<float>(t[position]);
            if (p.half)
              static_cast<uint16_t*>(packed)[at + position * step] = bf16_from_float(value);
            else
              static_cast<float*>(packed)[at + position * step] = value;
          }
        }
    }
  });
}

}  // namespace ddpm_fast::inference
