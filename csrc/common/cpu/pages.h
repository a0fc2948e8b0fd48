// Large workspaces on large pages.
//
// The C library gives every allocation beyond 32 MB back to the system when it is freed, so that
// such a workspace is made of new pages in every call: at 4 KiB each, faulting them in costs a
// tenth of the FFN's backward. Linux maps 2 MiB at a time where it is asked to.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bigkern {

constexpr size_t kMapped = size_t(32) << 20;  // from where on memory is always new

inline void prefer_large_pages(void* memory, size_t bytes, size_t least = kMapped) {
#if defined(__linux__)
  constexpr size_t kPage = size_t(2) << 20;
  if (bytes < least) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: may fail
#else
  (void)memory, (void)bytes, (void)least;
#endif
}

}  // namespace bigkern
