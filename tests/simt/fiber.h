// A fiber: a function that can stop in the middle and be continued later, on a stack of its own.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace bigkern::simt {

class Fiber {
 public:
  Fiber();  // maps the stack, with a guard page below it
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() begins entry(), which must not return: its last act is suspend(). Whatever
  // the fiber was doing before is forgotten, without running destructors.
  void start(void (*entry)());

  // Continues the fiber, until it calls suspend().
  void resume();

  // Called on the fiber itself: goes back to where resume() was called.
  void suspend();

 private:
  void* stack_ = nullptr;  // lowest usable address
  void (*entry_)() = nullptr;
#if defined(__x86_64__) || defined(__aarch64__)
  void* fiber_sp_ = nullptr;  // stack pointers of the two sides, while the other one runs
  void* host_sp_ = nullptr;
#else
  ucontext_t fiber_context_;
  ucontext_t host_context_;
#endif
  // AddressSanitizer wants to know on which stack it is; unused without it.
  void* fiber_fake_stack_ = nullptr;
  void* host_fake_stack_ = nullptr;
  const void* host_stack_ = nullptr;
  size_t host_stack_bytes_ = 0;

  static void run_entry();
  void switch_to_fiber();
  void switch_to_host();
};

}  // namespace bigkern::simt
