// Weights as `Kernels::gemm` reads them.
//
// Columns are cut into groups of up to four panels of 16 (equal groups as far as possible), and a group is
// [position][k][16 * panels], in half tables [position][k / 2][16 * panels][2]: one contiguous stream. What position, k
// and column mean is the kind's:
//   winograd  16 transformed taps x in, columns out       window    9 transformed taps x in, columns out
//   doubled   9 transformed taps x in, columns out        point     the middle tap x in, columns out
//   direct, strided  9 taps x in, columns out             linear    1 x in, columns out
//   up        1 x in, columns (ky, kx, out)               first     1 x (in, ky, kx), columns out; float32
//   down      4 taps x in, columns out                     first7x7  7 x (kx, in) with k even in half tables, columns
//   out output    1 x in, columns out filled up to 16; float32; output3x3: 9 taps x in
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace ddpm_fast::inference {

enum class Kind {
  winograd,
  direct,
  strided,
  doubled,
  window,
  point,
  linear,
  first,
  first7x7,
  up,
  down,
  output,
  output3x3
};

Kind kind_named(const std::string& name);  // throws std::invalid_argument

struct Group {
  int64_t first_panel, panels, offset;  // offset: elements from the start of the packed weights
};

struct Packing {
  Packing(Kind kind, const Kernels& kernels, int64_t out_channels, int64_t in_channels);
  bool half;
  int64_t positions, k, columns;
  int64_t k_padded;  // k with the zeros
  std::vector<Group> groups;
  int64_t elements = 0;
  int64_t bytes() const { return elements * (half ? 2 : 4); }
  // Elements from one position of a group to the next.
  int64_t position_elements(const Group& group) const { return k_padded * group.panels * kPanel; }
};

void pack(
    Kind kind, const Kernels& kernels, int64_t out_channels, int64_t in_channels, const float* weight, void* packed,
    int threads
);

}  // namespace ddpm_fast::inference
