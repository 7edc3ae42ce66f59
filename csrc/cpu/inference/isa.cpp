// Which kernel tables were built and can run here.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(DDPM_FAST_AMX_KERNELS)
#include "amx_permission.h"
#endif

namespace ddpm_fast::inference {
namespace {

std::vector<const Kernels*> possible_kernels() {
  std::vector<const Kernels*> tables;
#if defined(DDPM_FAST_X86_KERNELS)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if defined(DDPM_FAST_AMX_KERNELS)
  if (avx512 && amx_bf16_usable()) tables.push_back(kernels_amx_bf16());
#endif
#if defined(DDPM_FAST_BF16_KERNELS)
  if (avx512 && __builtin_cpu_supports("avx512bf16")) tables.push_back(kernels_avx512_bf16());
#endif
  if (avx512) tables.push_back(kernels_avx512());
  if (avx2) tables.push_back(kernels_avx2());
#endif
  tables.push_back(kernels_plain());
  return tables;
}

const std::vector<const Kernels*>& all_kernels() {
  static const std::vector<const Kernels*> tables = possible_kernels();
  return tables;
}

}  // namespace

std::vector<const Kernels*> usable_kernels() {
  const std::vector<const Kernels*>& all = all_kernels();
  const char* limit = std::getenv("DDPM_FAST_CPU_ISA");
  if (limit == nullptr || *limit == '\0') return all;
  const std::string wanted = limit;
  const std::vector<std::string> order = {"amx_bf16", "avx512_bf16", "avx512", "avx2", "plain"};
  std::vector<const Kernels*> tables;
  bool reached = false;
  for (const std::string& name : order) {
    reached = reached || name == wanted;
    for (const Kernels* table : all)
      if (reached && name == table->name) tables.push_back(table);
  }
  if (!reached)
    throw std::invalid_argument(
        "DDPM_FAST_CPU_ISA must be one of amx_bf16, avx512_bf16, avx512, avx2 and plain, got '" + wanted + "'"
    );
  return tables;
}

const Kernels& kernels_named(const std::string& name) {
  std::string known;
  for (const Kernels* table : usable_kernels()) {
    if (name == table->name) return *table;
    known += std::string(known.empty() ? "" : ", ") + table->name;
  }
  throw std::invalid_argument("instruction set '" + name + "' cannot be used here; usable: " + known);
}

const Kernels& float_kernels(const Kernels& kernels) {
  if (!kernels.half) return kernels;
  for (const Kernels* table : all_kernels())
    if (!table->half) return *table;
  return kernels;  // not reached: the plain table is always there
}

}  // namespace ddpm_fast::inference
