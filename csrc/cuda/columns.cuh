// A block of threads as rows and columns: what the kernels share that have several sums side by side.
#pragma once

#include "reduce.cuh"

namespace ddpm_fast {

// The threads of a block as rows of `columns` packs; a thread has the places row, row + rows, ... of the
// packs column, column + columns, ...
struct Columns {
  uint32_t packs, columns, rows, column, row;
  __device__ explicit Columns(uint32_t packs) : packs(packs), columns(packs < kThreads ? packs : kThreads) {
    rows = kThreads / columns;
    row = threadIdx.x / columns;
    column = threadIdx.x - row * columns;
  }
  // Calls body(pack, whether the thread has it) equally often in all threads.
  template <typename Body>
  __device__ void for_each_pack(const Body& body) const {
    for (uint32_t first = 0; first < packs; first += columns)
      body(first + column, row < rows && first + column < packs);
  }
  // Calls body(offset) for the places of a pack of N channels; a share has `places` places from the offset `start` on.
  template <int N, typename Share, typename Body>
  __device__ void for_each_place(const Share& share, const Work& work, uint32_t pack, const Body& body) const {
    for (uint32_t place = row; place < share.places; place += rows)
      body(share.start + (static_cast<int64_t>(place) * work.channels + pack * N));
  }
};

// The sums over the rows of a column, as a tree, in the threads of row 0. All threads of the block must call it.
template <int N>
__device__ inline void sum_rows(const Columns& at, Floats<N>& sums) {
  __shared__ float of_thread[N][kThreads];
#pragma unroll
  for (int j = 0; j < N; ++j)
    of_thread[j][threadIdx.x] = sums[j];
  __syncthreads();
  for (uint32_t rows = at.rows; rows > 1; rows = (rows + 1) / 2) {
    const uint32_t half = (rows + 1) / 2;
    if (at.row + half < rows) {
#pragma unroll
      for (int j = 0; j < N; ++j)
        of_thread[j][threadIdx.x] = of_thread[j][threadIdx.x] + of_thread[j][threadIdx.x + half * at.columns];
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < N; ++j)
    sums[j] = of_thread[j][threadIdx.x];
  __syncthreads();  // of_thread may be written again by the next call
}

}  // namespace ddpm_fast
