// May this process use AMX? Compiled without any instruction set flag.
#pragma once

namespace ddpm_fast::inference {

// Whether the processor has AMX with bfloat16 (and the AVX512 and AVX512-BF16 that kernels_amx_bf16 uses beside it) and
// the operating system lets this process have its registers. Asks Linux for that permission on the first call; it then
// holds for all threads of the process, those to come included. False on other systems.
bool amx_bf16_usable();

}  // namespace ddpm_fast::inference
