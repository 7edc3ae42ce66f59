// Runs the layers one after the other on all threads.
//
// Whoever takes range 0 of the parallel region leads: it opens one layer after the other and waits until all items of
// a layer are finished. Helpers take items of open layers. Nobody waits for a helper that has not come yet, so a thread
// that the system holds back costs its share of the work and nothing else.
#include "program.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <set>
#include <thread>

#include "../parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ddpm_fast::inference {
namespace {

constexpr int kSpins = 4000;  // some ten microseconds; then others may have the core

template <typename Ready>
void wait_until(const Ready& ready) {
  for (int spins = 0; !ready(); ++spins) {
    if (spins > kSpins) {
      std::this_thread::yield();
      continue;
    }
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
}

struct alignas(64) Phase {
  std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int64_t> finished{0};
};

class Execution {
 public:
  Execution(
      const std::vector<std::unique_ptr<Layer>>& layers, const std::vector<int64_t>& items,
      const std::vector<int64_t>& firsts, const Run& run
  )
      : layers_(layers), items_(items), firsts_(firsts), run_(run), phases_(layers.size()) {
    for (const auto& layer : layers)
      if (layer->kernels().begin != nullptr) set_up_.insert(&layer->kernels());
  }

  void lead(char* scratch, std::vector<double>& seconds) {
    begin();
    auto before = std::chrono::steady_clock::now();
    for (size_t i = 0; i < layers_.size(); ++i) {
      opened_.store(i + 1, std::memory_order_release);
      work(i, scratch);
      wait_until([&] { return phases_[i].finished.load(std::memory_order_acquire) == items_[i]; });
      const auto now = std::chrono::steady_clock::now();
      seconds[i] += std::chrono::duration<double>(now - before).count();
      before = now;
    }
    end();
  }

  void help(char* scratch) {
    begin();
    for (size_t i = 0; i < layers_.size(); ++i) {
      wait_until([&] { return opened_.load(std::memory_order_acquire) > i; });
      work(i, scratch);
    }
    end();
  }

 private:
  void work(size_t i, char* scratch) {
    Run run = run_;
    run.first = firsts_[i];
    for (int64_t item; (item = phases_[i].next.fetch_add(1, std::memory_order_relaxed)) < items_[i];) {
      layers_[i]->work(item, run, scratch);
      phases_[i].finished.fetch_add(1, std::memory_order_release);
    }
  }

  void begin() const {
    for (const Kernels* kernels : set_up_)
      kernels->begin();
  }
  void end() const {
    for (const Kernels* kernels : set_up_)
      kernels->end();
  }

  const std::vector<std::unique_ptr<Layer>>& layers_;
  const std::vector<int64_t>& items_;
  const std::vector<int64_t>& firsts_;
  const Run& run_;
  std::vector<Phase> phases_;
  std::atomic<size_t> opened_{0};
  std::set<const Kernels*> set_up_;
};

}  // namespace

void Program::run(Run run, int threads) {
  threads = std::max(threads, 1);
  run.columns = columns_;
  int64_t bytes = 0;
  for (const auto& layer : layers_)
    bytes = std::max(bytes, layer->scratch_bytes());
  seconds_.resize(layers_.size());
  while (static_cast<int>(scratch_.size()) < threads)
    scratch_.push_back(std::make_unique<char[]>(static_cast<size_t>(bytes + 64)));
  if (threads != threads_) {
    items_.clear();
    for (const auto& layer : layers_)
      items_.push_back(layer->cut(threads));
    threads_ = threads;
  }
  Execution execution(layers_, items_, firsts_, run);
  parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uintptr_t address = reinterpret_cast<uintptr_t>(scratch_[static_cast<size_t>(i)].get());
      char* scratch = reinterpret_cast<char*>((address + 63) / 64 * 64);
      if (i == 0)
        execution.lead(scratch, seconds_);
      else
        execution.help(scratch);
    }
  });
}

}  // namespace ddpm_fast::inference
