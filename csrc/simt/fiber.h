// Fibers: functions that can be left in the middle and gone on with, one for each emulated thread.
//
// On x86-64 a switch is fifteen instructions; elsewhere ucontext does it, three times slower.
// Address sanitizer is told of every switch.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace snoopi {
namespace fibers {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 * 1024;  // its frames are several times larger
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif

#if defined(__x86_64__)
// Saves what a function must preserve, then goes on where `to` was left.
__attribute__((naked, noipa)) inline void switch_stack([[maybe_unused]] void** from,
                                                       [[maybe_unused]] void* to) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

// A place to go on from: a stack of its own, or the one that the program runs on.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (stack_ != nullptr) munmap(stack_, kStackBytes);
  }

  // `entry` is called at the next switch to this fiber. It must not return.
  void start(void (*entry)()) {
    if (stack_ == nullptr) {
      void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) abort();
      stack_ = static_cast<char*>(memory);
      bottom_ = stack_;
      size_ = kStackBytes;
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, kStackBytes);  // of a fiber that was given up
    fake_stack_ = nullptr;
#endif
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack_ + kStackBytes) - 2;
    *top = reinterpret_cast<void*>(entry);  // aligned as after a call
    pointer_ = top - 6;                     // six registers, whatever they hold
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // Leaves `from`, where the program is, and goes on here. `last`: `from` will not be gone on with.
  void enter(Fiber& from, [[maybe_unused]] bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
    previous() = &from;
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack_, bottom_, size_);
#endif
#if defined(__x86_64__)
    switch_stack(&from.pointer_, pointer_);
#else
    swapcontext(&from.context_, &context_);
#endif
    from.arrived();
  }

  // To be called first where a fiber begins.
  void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
    if (previous()->stack_ == nullptr) {  // the program's own stack
      previous()->bottom_ = bottom;
      previous()->size_ = size;
    }
#endif
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static Fiber*& previous() {
    static Fiber* fiber = nullptr;
    return fiber;
  }
  void* fake_stack_ = nullptr;
#endif
#if defined(__x86_64__)
  void* pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  char* stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
};

}  // namespace fibers
}  // namespace snoopi
