// The instruction sets that this machine can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace ddpm_fast::inference {

// Best first. The environment variable DDPM_FAST_CPU_ISA leaves out whatever is better than what it names.
std::vector<const Kernels*> usable_kernels();

// The table called `name`; throws std::invalid_argument for one that does not exist or cannot run here.
const Kernels& kernels_named(const std::string& name);

// The best float32 table that `kernels` implies: first and last layer use it in half plans too.
const Kernels& float_kernels(const Kernels& kernels);

}  // namespace ddpm_fast::inference
