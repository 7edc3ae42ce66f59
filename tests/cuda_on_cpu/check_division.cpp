// FastDiv (csrc/cuda/work.cuh) against the division of the language: exits with 1 at the first difference.
#include <cstdio>

#include "cuda/work.cuh"

int main() {
  constexpr uint32_t kEnd = 0x7FFFFFFFu;  // the largest number divided
  uint64_t checked = 0, state = 1;
  const auto random = [&state] {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
  };
  const auto same = [&checked](uint32_t n, uint32_t d) {
    ++checked;
    const bool equal = ddpm_fast::FastDiv(d).quotient(n) == n / d;
    if (!equal) std::printf("%u / %u\n", n, d);
    return equal;
  };
  for (int i = 0; i < 2000000; ++i) {
    const uint32_t shift = random() % 31;
    const uint32_t d = i < 5000   ? static_cast<uint32_t>(i) + 1
                       : i < 5062 ? (1u << (i - 5000) / 2) + i % 2
                                  : (random() >> shift) + 1;
    if (d > kEnd) continue;
    const uint32_t multiple = kEnd / d * d;  // the quotient is hardest to get right just below and at multiples of d
    const uint32_t k = random() % (kEnd / d) * d;
    if (!same(kEnd, d) || !same(multiple, d) || !same(multiple - 1, d) || !same(k, d) || !same(k + d - 1, d) ||
        !same(random(), d))
      return 1;
  }
  std::printf("%llu quotients are right\n", static_cast<unsigned long long>(checked));
  return checked > 1000000 ? 0 : 1;
}
