// Runs the lanes (threads) of a CUDA block one after another on one CPU thread.
//
// A lane runs until it ends or must wait for others (__syncthreads, a shuffle); then another goes on. Each waiting lane
// keeps a stack of its own, so a kernel that never waits needs one stack and costs a function call per lane. One warp
// runs as far ahead of the others as it can, the first warp and the last by turns, so that a forgotten barrier shows
// every time. A barrier that not all lanes reach ends the process.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "fiber.h"

namespace cuda_on_cpu {

constexpr int kWarp = 32;

class Block {
 public:
  // Calls body(lane) for all lanes; body may call barrier() and the shuffles.
  template <typename Body>
  void run(int lanes, const Body& body) {
    lanes_ = alive_ = lanes;
    call_ = [](const void* it, int lane) { (*static_cast<const Body*>(it))(lane); };
    body_ = &body;
    run_all();
  }

  int lane() const { return current_->lane; }

  void barrier() {
    if (++arrived_ == alive_) {
      arrived_ = 0;
      ++passed_;
    } else {
      wait(passed_);
    }
  }

  // The value of the lane `delta` further on in its segment of `width` lanes; beyond the segment, one's own.
  uint32_t shuffle_down(uint32_t mask, uint32_t value, int delta, int width) {
    const int in_warp = current_->lane % kWarp;
    return shuffle(mask, value, in_warp % width + delta < width ? in_warp + delta : in_warp);
  }

  // The value of a lane of the warp.
  uint32_t shuffle(uint32_t mask, uint32_t value, int source) {
    const int in_warp = current_->lane % kWarp;
    Warp& warp = warps_[static_cast<size_t>(current_->lane / kWarp)];
    if (mask != 0xFFFFFFFFu) fail("a shuffle names only a part of the warp");
    if (warp.ended != 0) fail("a shuffle after some lanes of the warp have ended");
    const unsigned turn = warp.passed % 2;  // a lane can be one shuffle ahead of the others, not two
    warp.values[turn][in_warp] = value;
    if (++warp.arrived == kWarp) {
      warp.arrived = 0;
      ++warp.passed;
    } else {
      wait(warp.passed);
    }
    return warp.values[turn][source];
  }

 private:
  struct Stack {
    Fiber fiber{&Block::entry};
    bool waiting = false;
    int lane = 0;
    const unsigned* counter = nullptr;  // what it waits for: a change of *counter from `seen`
    unsigned seen = 0;
  };
  struct Warp {
    uint32_t values[2][kWarp] = {};
    int arrived = 0, ended = 0;
    unsigned passed = 0;
  };

  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
    std::abort();
  }

  void run_all() {
    next_lane_ = arrived_ = 0;
    warps_.assign(static_cast<size_t>((lanes_ + kWarp - 1) / kWarp), Warp{});
    for (size_t used = 0; next_lane_ < lanes_; ++used) {
      if (used == stacks_.size()) stacks_.push_back(std::make_unique<Stack>());
      resume(*stacks_[used]);
    }
    ++runs_;
    while (alive_ > 0) {
      bool progress = false;
      const size_t groups = (stacks_.size() + kWarp - 1) / kWarp;
      for (size_t i = 0; i < groups; ++i) {
        while (advance(runs_ % 2 == 0 ? i : groups - 1 - i))
          progress = true;
      }
      if (!progress) fail("a barrier or shuffle was not reached by all lanes");
    }
  }

  // Resumes those lanes of one warp that have what they wait for; whether there were any.
  bool advance(size_t group) {
    bool progress = false;
    for (size_t i = group * kWarp; i < stacks_.size() && i < (group + 1) * kWarp; ++i) {
      Stack& stack = *stacks_[i];
      if (!stack.waiting || *stack.counter == stack.seen) continue;
      stack.waiting = false;
      progress = true;
      resume(stack);
    }
    return progress;
  }

  void wait(const unsigned& counter) {
    current_->waiting = true;
    current_->counter = &counter;
    current_->seen = counter;
    current_->fiber.leave();
  }

  // On a stack: take lanes until there are none left, then rest until the next block.
  void work(Stack& self) {
    for (;;) {
      while (next_lane_ < lanes_) {
        self.lane = next_lane_++;
        call_(body_, self.lane);
        ++warps_[static_cast<size_t>(self.lane / kWarp)].ended;
        if (--alive_ > 0 && arrived_ == alive_) {  // lanes that have ended are not waited for
          arrived_ = 0;
          ++passed_;
        }
      }
      self.fiber.leave();
    }
  }

  static void entry();

  void resume(Stack& stack) {
    current_ = &stack;
    stack.fiber.resume();
  }

  std::vector<std::unique_ptr<Stack>> stacks_;
  std::vector<Warp> warps_;
  void (*call_)(const void* body, int lane) = nullptr;
  const void* body_ = nullptr;
  Stack* current_ = nullptr;
  int lanes_ = 0, alive_ = 0, next_lane_ = 0, arrived_ = 0;
  unsigned passed_ = 0, runs_ = 0;
};

// One for all threads of the process: launches take turns, see cudaLaunchKernelEx.
inline Block block;

inline void Block::entry() {
  block.current_->fiber.arrive();
  block.work(*block.current_);
}

}  // namespace cuda_on_cpu
