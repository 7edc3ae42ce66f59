// normal and random_bits: fill a tensor with the library's noise.
#include "../philox.h"
#include "tile.h"

namespace ddpm_fast {

Status normal_cpu(const FillArgs& args, int threads) {
  for_each_tile(args.shape, threads, [&](const Run& run) {
    Tile scratch;
    float* z = begin_store(args.out, args.shape, run, scratch);
    normal_tile(
        static_cast<uint64_t>(args.noise.rng[0]),
        static_cast<uint64_t>(args.noise.rng[1]) + static_cast<uint64_t>(run.n), args.noise.stream, run.first,
        run.count, z
    );
    store(args.out, args.shape, run, z);
  });
  return {};
}

namespace {

DDPM_FAST_CLONES void bits_run(uint64_t seed, uint64_t sample, uint32_t stream, const Run& run, int64_t* out) {
  for (int64_t i = 0; i < run.count; i += 4) {
    uint32_t r[4];
    bits_quad(seed, sample, stream, static_cast<uint32_t>((run.first + i) / 4), r);
    for (int64_t k = 0; k < std::min<int64_t>(4, run.count - i); ++k)
      out[i + k] = r[k];
  }
}

}  // namespace

// out is contiguous: random integers have no memory format to keep.
Status random_bits_cpu(const FillArgs& args, int threads) {
  for_each_tile(args.shape, threads, [&](const Run& run) {
    bits_run(
        static_cast<uint64_t>(args.noise.rng[0]),
        static_cast<uint64_t>(args.noise.rng[1]) + static_cast<uint64_t>(run.n), args.noise.stream, run,
        args.bits + run.n * args.shape.elements() + run.first
    );
  });
  return {};
}

}  // namespace ddpm_fast
