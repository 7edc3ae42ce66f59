// Faults that a sanitizer must find, one by its name on the command line: see sanitize.py.
#include <cstdio>
#include <cstring>

constexpr int kThreads = 64;

// 64 threads write 64 values to the end of the array, and with `beyond` = 1 one value more.
__global__ void planted_bounds(int* out, int beyond) { out[threadIdx.x + beyond] = threadIdx.x; }

// Each thread reads what one of the other warp wrote, with nothing in between to wait for it.
__global__ void planted_race(int* out, bool wait) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = threadIdx.x;
  if (wait) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + kThreads / 2) % kThreads];
}

// Some threads of a warp wait for all of the block, the others do not.
__global__ void planted_sync(int* out, int waiting) {
  if (threadIdx.x < waiting) __syncthreads();
  out[threadIdx.x] = threadIdx.x;
}

int main(int count, char** arguments) {
  const char* fault = count == 2 ? arguments[1] : "";
  int* out = nullptr;
  if (cudaMalloc(&out, kThreads * sizeof(int)) != cudaSuccess) return 3;
  planted_bounds<<<1, kThreads>>>(out, std::strcmp(fault, "bounds") == 0);
  planted_race<<<1, kThreads>>>(out, std::strcmp(fault, "race") != 0);
  planted_sync<<<1, kThreads>>>(out, std::strcmp(fault, "sync") == 0 ? 40 : kThreads);
  const cudaError_t status = cudaDeviceSynchronize();
  std::printf("planted fault: %s, %s\n", fault, cudaGetErrorString(status));
  return 0;
}
