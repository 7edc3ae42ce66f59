// The product on emulated tiles with every row, the weights and the sums at the ends of their own allocations, for
// AddressSanitizer: what is read or written beyond ends the process. Checks the sums loosely as well.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "../../csrc/cpu/inference/kernels.h"

using namespace ddpm_fast::inference;

namespace {

uint16_t bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);  // the values of this file have no more than 8 bits
}

float a_value(int64_t row, int64_t k) { return static_cast<float>((7 * row + 3 * k) % 11 - 5); }

float b_value(int64_t k, int64_t column) { return static_cast<float>((5 * k + column) % 7 - 3); }

template <typename T>
T* allocate(int64_t count) {
  return static_cast<T*>(std::malloc(static_cast<size_t>(count) * sizeof(T)));
}

bool check(int64_t m, int64_t panels, int64_t k, int64_t segments, bool pointers, bool next) {
  const Kernels* kernels = kernels_amx_bf16();
  const int64_t padded = (k + kernels->k_multiple - 1) / kernels->k_multiple * kernels->k_multiple;
  const int64_t width = panels * kPanel, count = segments * m;
  uint16_t* b = allocate<uint16_t>(segments * padded * width);
  for (int64_t s = 0; s < segments; ++s)
    for (int64_t p = 0; p < padded; ++p)
      for (int64_t j = 0; j < width; ++j)
        b[(s * padded + p / 2 * 2) * width + 2 * j + p % 2] = bfloat16(p < k ? b_value(s + p, j) : 0.0f);
  uint16_t* all = allocate<uint16_t>(pointers ? 1 : count * k);
  void** rows = allocate<void*>(count);
  for (int64_t i = 0; i < count; ++i) {
    uint16_t* row = pointers ? allocate<uint16_t>(k) : all + i * k;
    for (int64_t p = 0; p < k; ++p)
      row[p] = bfloat16(a_value(i, p));
    rows[i] = row;
  }
  float* c = allocate<float>(m * width);
  Gemm g;
  g.rows = pointers ? rows : nullptr;
  g.a = all;
  g.a_stride = k;
  g.m = m;
  g.segments = segments;
  g.k = k;
  g.b = b;
  g.next = next ? b : nullptr;
  g.next_bytes = next ? segments * padded * width * 2 : 0;
  g.panels = panels;
  g.c = c;
  kernels->begin();
  kernels->gemm(g);
  kernels->end();
  bool right = true;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < width; ++j) {
      float sum = 0.0f;  // of small integers: exact in any order
      for (int64_t s = 0; s < segments; ++s)
        for (int64_t p = 0; p < k; ++p)
          sum += a_value(s * m + i, p) * b_value(s + p, j);
      right = right && c[i * width + j] == sum;
    }
  for (int64_t i = 0; i < count && pointers; ++i)
    std::free(rows[i]);
  std::free(rows);
  std::free(all);
  std::free(b);
  std::free(c);
  if (!right)
    std::printf(
        "wrong: m %d panels %d k %d segments %d pointers %d\n", static_cast<int>(m), static_cast<int>(panels),
        static_cast<int>(k), static_cast<int>(segments), pointers
    );
  return right;
}

}  // namespace

int main() {
  int wrong = 0;
  for (const int64_t m : {1, 15, 16, 17, 33, 48, 70})
    for (int64_t panels = 1; panels <= 4; ++panels)
      for (const int64_t k : {16, 32, 48, 304}) {
        wrong += !check(m, panels, k, 1, false, panels == 2);
        wrong += !check(m, panels, k, k < 100 ? 9 : 2, true, panels == 3);
      }
  return wrong;
}
