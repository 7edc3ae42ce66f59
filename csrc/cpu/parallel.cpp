// The thread pool behind parallel_for.
#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace ddpm_fast {
namespace {

// Each call is cut into a few more ranges than threads, so that a thread that was held up does not hold up the call.
constexpr int64_t kRangesPerThread = 4;

struct Job {
  const std::function<void(int64_t, int64_t)>* body;
  int64_t count, ranges;
  std::atomic<int64_t> next{0}, finished{0};

  void work() {
    for (int64_t i = next.fetch_add(1); i < ranges; i = next.fetch_add(1)) {
      (*body)(count* i / ranges, count * (i + 1) / ranges);
      finished.fetch_add(1, std::memory_order_release);
    }
  }
};

class Pool {
 public:
  std::mutex busy;  // held by the call that uses the pool

  void run(const std::shared_ptr<Job>& job, int helpers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(threads_.size()) < helpers)
        threads_.emplace_back([this] { serve(); }).detach();
      job_ = job;
      wanted_ = helpers;
    }
    wake_.notify_all();
    job->work();
    while (job->finished.load(std::memory_order_acquire) < job->ranges)
      std::this_thread::yield();
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      --wanted_;
      const std::shared_ptr<Job> job = job_;  // keeps the job alive past the call that made it
      lock.unlock();
      job->work();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
  std::shared_ptr<Job> job_;
  int wanted_ = 0;
};

// Never destroyed: its threads may still wait when the process ends. After a fork the child has none of them and makes
// a new pool; the parent's is left alone, because its locks may be held by threads that do not exist in the child.
std::atomic<Pool*> g_pool{nullptr};

Pool& pool() {
  Pool* current = g_pool.load(std::memory_order_acquire);
  if (current != nullptr) return *current;
  Pool* made = new Pool;
  if (g_pool.compare_exchange_strong(current, made)) {
#if defined(__unix__) || defined(__APPLE__)
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { g_pool.store(nullptr); }); });
#endif
    return *made;
  }
  delete made;
  return *current;
}

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  const int64_t workers = std::min<int64_t>(std::max(threads, 1), count);
  if (workers > 1) {
    Pool& p = pool();
    std::unique_lock<std::mutex> lock(p.busy, std::try_to_lock);
    if (lock.owns_lock()) {
      auto job = std::make_shared<Job>();
      job->body = &body;
      job->count = count;
      job->ranges = std::min<int64_t>(count, workers * kRangesPerThread);
      p.run(job, static_cast<int>(workers - 1));
      return;
    }
  }
  body(0, count);
}

}  // namespace ddpm_fast
