// The memory that a block shares: poisoned before each block, and fenced.
#pragma once

#include <link.h>

#include <algorithm>
#include <cstring>

#include "simt/simt.h"

#if defined(BIGKERN_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace bigkern::simt {

// Dynamic shared memory, between two fences that nobody may write to. AddressSanitizer guards them
// to the byte and at once; without it, a pattern in them is looked at when the block is done.
class SharedMemory {
 public:
  void prepare(size_t bytes) {
    bytes_ = bytes;
#if defined(BIGKERN_SIMT_ASAN)
    __asan_unpoison_memory_region(storage_, sizeof storage_);
    __asan_poison_memory_region(storage_, kFence);
    __asan_poison_memory_region(data() + bytes, kMaxDynamicSmem - bytes + kFence);
#else
    memset(storage_, kPattern, kFence);
    memset(data() + bytes, kPattern, kFence);
#endif
    memset(data(), 0xff, bytes);
  }

  bool fences_hold() const {
#if defined(BIGKERN_SIMT_ASAN)
    return true;
#else
    const auto holds = [](const unsigned char* fence) {
      return std::all_of(fence, fence + kFence, [](unsigned char c) { return c == kPattern; });
    };
    return holds(storage_) && holds(storage_ + kFence + bytes_);
#endif
  }

  unsigned char* data() { return storage_ + kFence; }

 private:
  static constexpr size_t kFence = 1024;
  static constexpr unsigned char kPattern = 0xa5;
  alignas(1024) unsigned char storage_[kFence + kMaxDynamicSmem + kFence];
  size_t bytes_ = 0;
};

// Static shared memory is thread_local (see names.h), so it is this module's part of the running
// thread's local storage, and this fills it with NaN.
class StaticSharedMemory {
 public:
  void find() {
#if !defined(BIGKERN_SIMT_ASAN)
    static thread_local char anchor = 0;  // touching it makes the loader allocate the storage
    *static_cast<volatile char*>(&anchor) = 0;
    begin_ = nullptr;
    bytes_ = 0;
    dl_iterate_phdr(&StaticSharedMemory::visit, this);
#endif
  }

  void poison() {
    if (bytes_ != 0) memset(begin_, 0xff, bytes_);
  }

  bool untouched() const {
    const auto* bytes = static_cast<const unsigned char*>(begin_);
    return std::all_of(bytes, bytes + bytes_, [](unsigned char c) { return c == 0xff; });
  }

 private:
  static int visit(dl_phdr_info* module, size_t, void* context) {
    auto* self = static_cast<StaticSharedMemory*>(context);
    const auto here = reinterpret_cast<uintptr_t>(&StaticSharedMemory::visit);
    bool ours = false;
    size_t bytes = 0;
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      const auto& segment = module->dlpi_phdr[i];
      const uintptr_t start = module->dlpi_addr + segment.p_vaddr;
      if (segment.p_type == PT_LOAD && here >= start && here < start + segment.p_memsz) ours = true;
      if (segment.p_type == PT_TLS) bytes = segment.p_memsz;
    }
    if (!ours) return 0;
    self->begin_ = module->dlpi_tls_data;
    self->bytes_ = module->dlpi_tls_data == nullptr ? 0 : bytes;
    return 1;
  }

  void* begin_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace bigkern::simt
