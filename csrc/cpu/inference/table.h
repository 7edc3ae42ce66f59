// The table of one instruction set, made of what vector.h, transforms.h and a gemm header define in this file.
#pragma once

#include "kernels.h"

#define DDPM_FAST_TABLE(isa, half, k_multiple, begin, end, gemm)                                                       \
  namespace ddpm_fast::inference {                                                                                     \
  const Kernels* kernels_##isa() {                                                                                     \
    static const Kernels table = {                                                                                     \
        #isa,                                                                                                          \
        half,                                                                                                          \
        k_multiple,                                                                                                    \
        begin,                                                                                                         \
        end,                                                                                                           \
        gemm,                                                                                                          \
        winograd_in,                                                                                                   \
        window_in,                                                                                                     \
        doubled_in,                                                                                                    \
        finish<WinogradOut>,                                                                                           \
        finish<WindowOut>,                                                                                             \
        finish<DoubledOut>,                                                                                            \
        finish<DirectOut>,                                                                                             \
        store_rows,                                                                                                    \
        to_float,                                                                                                      \
        moments,                                                                                                       \
        normalise,                                                                                                     \
        normalise_pixels,                                                                                              \
        pack_columns,                                                                                                  \
        pack_rows,                                                                                                     \
        softmax,                                                                                                       \
        key_weights,                                                                                                   \
        merge,                                                                                                         \
        row_weights,                                                                                                   \
        rescale_add,                                                                                                   \
        store_divided,                                                                                                 \
    };                                                                                                                 \
    return &table;                                                                                                     \
  }                                                                                                                    \
  }  // namespace ddpm_fast::inference
