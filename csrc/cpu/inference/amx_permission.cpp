// AMX has 8 KB of registers that Linux saves only for processes that asked for them.
#include "amx_permission.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <cstdint>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ddpm_fast::inference {

#if defined(__x86_64__) && defined(__linux__)
namespace {

constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h, which has it since Linux 5.16
constexpr long kTileData = 18;               // the bit of the tile registers in XCR0

constexpr bool has(uint64_t bits, int bit) { return (bits >> bit & 1) != 0; }

struct Leaf {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zeros for a leaf that the processor does not have.
Leaf leaf(uint32_t number, uint32_t part) {
  Leaf l;
  if (__get_cpuid_count(number, part, &l.eax, &l.ebx, &l.ecx, &l.edx) == 0) return {};
  return l;
}

// XCR0: which registers the operating system saves. Only where CPUID says OSXSAVE.
uint64_t saved_registers() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

bool processor_can() {
  const Leaf features = leaf(7, 0), more = leaf(7, 1), palette = leaf(0x1d, 1);
  const bool avx512 = has(features.ebx, 16) && has(features.ebx, 17) && has(features.ebx, 30) && has(features.ebx, 31);
  const bool amx = has(features.edx, 22) && has(features.edx, 24);  // AMX-BF16, AMX-TILE
  // Palette 1 is eight tiles of 16 rows of 64 bytes; a smaller one could not hold the kernels' configuration.
  const bool tiles = (palette.ebx & 0xffff) >= 64 && palette.ebx >> 16 >= 8 && (palette.ecx & 0xffff) >= 16;
  return avx512 && has(more.eax, 5) && amx && tiles;
}

bool system_saves() {
  if (!has(leaf(1, 0).ecx, 27)) return false;  // OSXSAVE
  // SSE, AVX, three parts of AVX512, tile configuration, tiles.
  constexpr uint64_t wanted = 1u << 1 | 1u << 2 | 7u << 5 | 3u << 17;
  return (saved_registers() & wanted) == wanted;
}

bool ask() { return processor_can() && system_saves() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0; }

}  // namespace

bool amx_bf16_usable() {
  static const bool usable = ask();
  return usable;
}
#else
bool amx_bf16_usable() { return false; }
#endif

}  // namespace ddpm_fast::inference
