#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace bigkern::simt {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 * 1024;  // red zones around every local variable need room
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

size_t page_bytes() {
  static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
  return bytes;
}

Fiber* starting = nullptr;  // the fiber that run_entry() is about to begin

}  // namespace

Fiber::Fiber() {
  void* mapping = mmap(nullptr, page_bytes() + kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mprotect(mapping, page_bytes(), PROT_NONE);  // stacks grow down: an overflow is a crash
  stack_ = static_cast<char*>(mapping) + page_bytes();
}

Fiber::~Fiber() { munmap(static_cast<char*>(stack_) - page_bytes(), page_bytes() + kStackBytes); }

void Fiber::run_entry() {
  Fiber* self = starting;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self->host_stack_, &self->host_stack_bytes_);
#endif
  self->entry_();
}

void Fiber::resume() {
  starting = this;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&host_fake_stack_, stack_, kStackBytes);
#endif
  switch_to_fiber();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(host_fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fiber_fake_stack_, host_stack_, host_stack_bytes_);
#endif
  switch_to_host();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber_fake_stack_, &host_stack_, &host_stack_bytes_);
#endif
}

#if defined(__x86_64__) || defined(__aarch64__)

// bigkern_simt_switch(void** save, void* load) pushes the registers that a function has to
// preserve, stores the stack pointer in *save, takes the other one and pops. A new stack is laid
// out as if it had been suspended at the very beginning of run_entry.

extern "C" void bigkern_simt_switch(void** save, void* load);

#if defined(__x86_64__)

asm(R"(
.text
.p2align 4
.hidden bigkern_simt_switch
.globl bigkern_simt_switch
.type bigkern_simt_switch, @function
bigkern_simt_switch:
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
.size bigkern_simt_switch, . - bigkern_simt_switch
)");

namespace {
constexpr int kFrameWords = 8;  // six registers, the return address, a zero for run_entry's own
constexpr int kReturnWord = 6;  // which of them is where the switch returns to
}  // namespace

#else

asm(R"(
.text
.p2align 4
.hidden bigkern_simt_switch
.globl bigkern_simt_switch
.type bigkern_simt_switch, %function
bigkern_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size bigkern_simt_switch, . - bigkern_simt_switch
)");

namespace {
constexpr int kFrameWords = 20;
constexpr int kReturnWord = 11;  // x30
}  // namespace

#endif

void Fiber::start(void (*entry)()) {
  entry_ = entry;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, kStackBytes);  // an abandoned run left red zones behind
#endif
  char* top = static_cast<char*>(stack_) + kStackBytes;
  auto* frame = reinterpret_cast<uintptr_t*>(top) - kFrameWords;
  for (int i = 0; i < kFrameWords; ++i) frame[i] = 0;
  frame[kReturnWord] = reinterpret_cast<uintptr_t>(&Fiber::run_entry);
  fiber_sp_ = frame;
}

void Fiber::switch_to_fiber() { bigkern_simt_switch(&host_sp_, fiber_sp_); }
void Fiber::switch_to_host() { bigkern_simt_switch(&fiber_sp_, host_sp_); }

#else  // any other machine: slower, since ucontext saves the signal mask with a system call

void Fiber::start(void (*entry)()) {
  entry_ = entry;
  getcontext(&fiber_context_);
  fiber_context_.uc_stack.ss_sp = stack_;
  fiber_context_.uc_stack.ss_size = kStackBytes;
  fiber_context_.uc_link = nullptr;
  makecontext(&fiber_context_, &Fiber::run_entry, 0);
}

void Fiber::switch_to_fiber() { swapcontext(&host_context_, &fiber_context_); }
void Fiber::switch_to_host() { swapcontext(&fiber_context_, &host_context_); }

#endif

}  // namespace bigkern::simt
