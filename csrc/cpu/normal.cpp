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

DDPM_FAST_CLONES void whole_quads(
    uint64_t seed, uint64_t sample, uint32_t stream, uint32_t first_quad, int64_t quads, int64_t* __restrict__ out
) {
  for (int64_t q = 0; q < quads; ++q) {
    uint32_t r[4];
    bits_quad(seed, sample, stream, first_quad + static_cast<uint32_t>(q), r);
    for (int k = 0; k < 4; ++k)
      out[4 * q + k] = r[k];
  }
}

void bits_run(uint64_t seed, uint64_t sample, uint32_t stream, const Run& run, int64_t* out) {
  const uint32_t first_quad = static_cast<uint32_t>(run.first / 4);
  const int64_t whole = run.count / 4;
  whole_quads(seed, sample, stream, first_quad, whole, out);
  if (run.count % 4 != 0) {
    int64_t last[4];
    whole_quads(seed, sample, stream, first_quad + static_cast<uint32_t>(whole), 1, last);
    std::copy(last, last + run.count % 4, out + 4 * whole);
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
