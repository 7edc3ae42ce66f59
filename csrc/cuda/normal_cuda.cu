// normal and random_bits: fill a tensor with the library's noise.
//
//   z[n, e] = normal(rng[0], rng[1] + n, stream, e)        csrc/philox.h
#include "draw.cuh"
#include "launch.cuh"

namespace ddpm_fast {
namespace {

template <typename T, typename Place>
__global__ void __launch_bounds__(kThreads) normal_kernel(FillArgs args, Work work) {
  const uint32_t thread = thread_index();
  if (thread >= work.threads) return;
  const Place at(work, Item(work, thread));
  store_image<T>(args.out, at, drawn_quad(args.noise, args.noise.stream, at));
}

// out is contiguous: random integers have no memory format to keep.
__global__ void __launch_bounds__(kThreads) random_bits_kernel(FillArgs args, Work work) {
  const uint32_t thread = thread_index();
  if (thread >= work.threads) return;
  const Item item(work, thread);
  uint32_t bits[4];
  bits_quad(seed_of(args.noise), sample_of(args.noise, item.sample), args.noise.stream, item.index, bits);
  int64_t* out = args.bits + item.sample * work.elements + 4 * item.index;
  const uint32_t count = work.elements - 4 * item.index;
#pragma unroll
  for (uint32_t j = 0; j < 4; ++j) {
    if (j < count) out[j] = bits[j];
  }
}

}  // namespace

Status normal_cuda(const FillArgs& args, int device, void* stream) {
  return for_each_launch(device, args.shape, quads_of(args.shape), [&](const Work& work) {
    if (!in_runs(args.shape, args.noise) || !aligned(args.out))
      return launch(normal_kernel<AnyFloat, Scattered>, work.threads, stream, args, work);
    return with_float_type(args.out.dtype, [&](auto type) {
      return launch(normal_kernel<decltype(type), Run>, work.threads, stream, args, work);
    });
  });
}

Status random_bits_cuda(const FillArgs& args, int device, void* stream) {
  return for_each_launch(device, args.shape, quads_of(args.shape), [&](const Work& work) {
    return launch(random_bits_kernel, work.threads, stream, args, work);
  });
}

}  // namespace ddpm_fast
