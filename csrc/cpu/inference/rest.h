// The rows that full micro-tiles leave over.
#pragma once

#include <cstdint>

namespace {

template <int N>
struct Number {
  static constexpr int value = N;
};

// call(Number<left>()) for a `left` of 1 .. MR - 1; nothing for 0.
template <int MR, typename Call>
inline __attribute__((always_inline)) void with_rest(int64_t left, const Call& call) {
  if constexpr (MR > 1) {
    if (left == MR - 1)
      call(Number<MR - 1>());
    else
      with_rest<MR - 1>(left, call);
  }
}

}  // namespace
