// Which thread does what. A thread has a quad: four neighbouring elements of one sample, counted as the noise counts
// them, in contiguous (C, H, W) order, so that it draws their noise once.
//
// Run: the four are neighbours in memory too, and aligned: one access of 4 x sizeof(T) bytes.
// Scattered: anything else (channels_last, samples of other sizes, misaligned pointers): up to four single accesses.
#pragma once

#include <cstdint>

#include "../kernels.h"

namespace ddpm_fast {

#ifndef DDPM_FAST_MAX_THREADS  // tests set a small one, so that their batches take several launches
#define DDPM_FAST_MAX_THREADS 0x7FFFFFFF
#endif
constexpr int64_t kMaxThreads = DDPM_FAST_MAX_THREADS;  // of one launch
constexpr int64_t kMaxElements = 0x7FFFFFFC;            // of one sample; their number is not limited

// n / divisor for n < 2^31 as a multiplication and a shift (Granlund & Montgomery 1994).
struct FastDiv {
  uint32_t divisor = 1, multiplier = 0, shift = 0;
  FastDiv() = default;
  explicit FastDiv(int64_t d) : divisor(d < 1 ? 1u : static_cast<uint32_t>(d)) {
    uint32_t log = 0;
    while ((uint64_t{1} << log) < divisor)
      ++log;
    shift = 31 + log;
    multiplier = static_cast<uint32_t>((uint64_t{1} << shift) / divisor + 1);
  }
  DDPM_FAST_HD uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>((static_cast<uint64_t>(n) * multiplier) >> shift);
  }
};

// The samples of one launch and how its threads divide among them.
struct Work {
  int64_t first_sample = 0;
  uint32_t threads = 0;
  uint32_t elements = 0, channels = 0, inner = 0;  // of a sample
  FastDiv by_threads, by_inner, by_channels;       // by_threads: threads of a sample
  bool channels_last = false;
  bool channel_fastest = false;  // neighbouring threads take neighbouring channels

  Work(const Shape& shape, int64_t first, int64_t samples, int64_t threads_per_sample)
      : first_sample(first), threads(static_cast<uint32_t>(samples * threads_per_sample)),
        elements(static_cast<uint32_t>(shape.elements())), channels(static_cast<uint32_t>(shape.channels)),
        inner(static_cast<uint32_t>(shape.inner)), by_threads(threads_per_sample), by_inner(shape.inner),
        by_channels(shape.channels), channels_last(shape.channels_last),
        channel_fastest(shape.channels_last && shape.inner % 4 == 0) {}
};

inline int64_t quads_of(const Shape& shape) { return (shape.elements() + 3) / 4; }

struct Item {  // the share of a thread: a number below the threads of a sample
  int64_t sample;
  uint32_t index;
  DDPM_FAST_HD Item(const Work& work, uint32_t thread) {
    const uint32_t row = work.by_threads.quotient(thread);
    sample = work.first_sample + row;
    index = thread - row * work.by_threads.divisor;
  }
  DDPM_FAST_HD Item(int64_t sample, uint32_t index) : sample(sample), index(index) {}
};

struct Run {
  static constexpr bool kScattered = false;
  int64_t sample, offset;
  uint32_t quad;
  DDPM_FAST_HD Run(const Work& work, const Item& item)
      : sample(item.sample), offset(item.sample * work.elements + 4 * item.index), quad(item.index) {}
  DDPM_FAST_HD bool has(int) const { return true; }
};

struct Scattered {
  static constexpr bool kScattered = true;
  int64_t sample, first;  // first: where the sample begins
  uint32_t quad, count;
  uint32_t channels, inner;
  bool channels_last;
  uint32_t channel[4], place[4];  // of each element

  DDPM_FAST_HD Scattered(const Work& work, const Item& item)
      : sample(item.sample), first(item.sample * work.elements), quad(item.index), channels(work.channels),
        inner(work.inner), channels_last(work.channels_last) {
    if (work.channel_fastest) {
      const uint32_t column = work.by_channels.quotient(item.index);
      quad = (item.index - column * channels) * (inner / 4) + column;
    }
    const uint32_t element = 4 * quad;
    count = work.elements - element;
    channel[0] = work.by_inner.quotient(element);
    place[0] = element - channel[0] * inner;
#pragma unroll
    for (int j = 1; j < 4; ++j) {
      const bool next = place[j - 1] + 1 == inner;
      channel[j] = channel[j - 1] + (next ? 1u : 0u);
      place[j] = next ? 0u : place[j - 1] + 1;
    }
  }
  DDPM_FAST_HD bool has(int j) const { return static_cast<uint32_t>(j) < count; }
  DDPM_FAST_HD int64_t offset(int j, bool last) const {
    return first + (last ? place[j] * channels + channel[j] : channel[j] * inner + place[j]);
  }
  DDPM_FAST_HD int64_t offset(int j) const { return offset(j, channels_last); }
};

}  // namespace ddpm_fast
