// A function on a stack of its own that can be left and resumed: what a lane of a block runs on.
//
// On x86-64 a switch saves the six registers that a callee must keep, and moves the stack pointer: some nanoseconds.
// Elsewhere it is swapcontext, which also asks the kernel for the signal mask, twice a switch, and which
// AddressSanitizer makes clear the shadow of the whole stack.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if !defined(__x86_64__)
#define CUDA_ON_CPU_UCONTEXT
#endif

#if defined(CUDA_ON_CPU_UCONTEXT)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

#if defined(CUDA_ON_CPU_UCONTEXT)

using Place = ucontext_t;

inline void switch_stack(Place& from, Place& to) { swapcontext(&from, &to); }

inline void prepare(Place& place, char* bottom, size_t size, void (*entry)()) {
  getcontext(&place);
  place.uc_stack.ss_sp = bottom;
  place.uc_stack.ss_size = size;
  makecontext(&place, entry, 0);
}

#else

using Place = void*;  // the stack pointer; the registers lie there

// Assembly rather than a function: the compiler knows nothing of it, so it expects every other register to be lost.
extern "C" void cuda_on_cpu_switch_stack(void** from, void* to);
asm(R"(
  .pushsection .text
  .type cuda_on_cpu_switch_stack, @function
cuda_on_cpu_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_on_cpu_switch_stack, . - cuda_on_cpu_switch_stack
  .popsection
)");

inline void switch_stack(Place& from, Place& to) { cuda_on_cpu_switch_stack(&from, to); }

// As if entry() had just been called, and its caller, at address 0, had none: stack traces end there.
inline void prepare(Place& place, char* bottom, size_t size, void (*entry)()) {
  const uintptr_t top = (reinterpret_cast<uintptr_t>(bottom) + size) & ~uintptr_t{15};
  auto* words = reinterpret_cast<uintptr_t*>(top) - 8;  // six registers, where to return to, what that returns to
  for (int i = 0; i < 8; ++i)
    words[i] = 0;
  words[6] = reinterpret_cast<uintptr_t>(entry);
  place = words;
}

#endif

class Fiber {
 public:
  // entry() must begin with arrive() and never return.
  explicit Fiber(void (*entry)()) { prepare(own_, memory_.get(), kBytes, entry); }
  Fiber(const Fiber&) = delete;

  // Goes on where the fiber was left; back when it is left again.
  void resume() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, memory_.get(), kBytes);
#endif
    switch_stack(home_, own_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // On the fiber: back to who resumed it.
  void leave() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack_, home_bottom_, home_bytes_);
#endif
    switch_stack(own_, home_);
    arrive();
  }

  // First thing after a switch onto the fiber: learns where the stack of who resumed it is.
  void arrive() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, &home_bottom_, &home_bytes_);
#endif
  }

 private:
  static constexpr size_t kBytes = 128 * 1024;

  std::unique_ptr<char[]> memory_{new char[kBytes]};
  Place own_{}, home_{};
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  const void* home_bottom_ = nullptr;
  size_t home_bytes_ = 0;
};

}  // namespace cuda_on_cpu
