// An allocator for tests, preloaded into Python: the tensors of torch between pages that nobody may
// touch.
//
// torch's CPU allocator asks for memory aligned to 64 bytes. A block ends where its last page ends,
// as far as that alignment allows:
//
//   | guard page | canary .. | block, filled with 0xFF | canary < 64 bytes | guard page |
//
// Reading or writing past a page faults; writing into the slack is found when the block is freed.
// All ones are a NaN in every floating-point type, so that reading what nobody wrote shows in the
// results. Freed blocks become guard pages, and their addresses are not used again. Other memory is
// glibc's.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>

extern "C" void* __libc_memalign(size_t alignment, size_t bytes);
extern "C" void* __libc_realloc(void* block, size_t bytes);
extern "C" void __libc_free(void* block);

namespace {

constexpr size_t kPage = 4096, kAlignment = 64;
constexpr size_t kRegionBytes = size_t(1) << 40;
constexpr unsigned char kCanary = 0xA5, kPoison = 0xFF;

void* reserve(size_t bytes, int protection) {
  void* memory =
      mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : memory;
}

struct Region {
  char* begin = static_cast<char*>(reserve(kRegionBytes, PROT_NONE));
  // The bytes that were asked for, by the page in which a block begins.
  size_t* sizes =
      static_cast<size_t*>(reserve(kRegionBytes / kPage * sizeof(size_t), PROT_READ | PROT_WRITE));
  std::atomic<size_t> used{kPage};

  bool holds(const void* block) const {
    return begin != nullptr && block >= begin && block < begin + kRegionBytes;
  }
  size_t& size_of(const void* block) const {
    return sizes[size_t(static_cast<const char*>(block) - begin) / kPage];
  }
};

Region& region() {
  static Region the_region;
  return the_region;
}

size_t round_up(size_t bytes, size_t step) { return (bytes + step - 1) / step * step; }

char* first_page(void* block) { return reinterpret_cast<char*>(uintptr_t(block) / kPage * kPage); }

// What the block occupies of its pages, the slack behind it included.
size_t occupied(size_t bytes) { return round_up(bytes == 0 ? 1 : bytes, kAlignment); }

void* guarded(size_t bytes) {
  Region& memory = region();
  const size_t pages = round_up(occupied(bytes), kPage);
  if (memory.begin == nullptr || memory.sizes == nullptr || pages >= kRegionBytes) return nullptr;
  const size_t at = memory.used.fetch_add(pages + kPage);
  if (at + pages + kPage > kRegionBytes) return nullptr;
  char* const begin = memory.begin + at;
  if (mprotect(begin, pages, PROT_READ | PROT_WRITE) != 0) return nullptr;
  char* const block = begin + pages - occupied(bytes);
  memset(begin, kCanary, size_t(block - begin));
  memset(block, kPoison, bytes);
  memset(block + bytes, kCanary, occupied(bytes) - bytes);
  memory.size_of(block) = bytes;
  return block;
}

[[noreturn]] void die(const char* message) {
  if (write(STDERR_FILENO, message, strlen(message)) < 0) _exit(1);
  abort();
}

void check(const char* from, const char* to, const char* message) {
  for (; from < to; ++from) {
    if (static_cast<unsigned char>(*from) != kCanary) die(message);
  }
}

void release(void* block) {
  const size_t bytes = region().size_of(block);
  char* const begin = first_page(block);
  char* const end = static_cast<char*>(block) + occupied(bytes);
  check(begin, static_cast<char*>(block), "guard allocator: written before the begin of a block\n");
  check(static_cast<char*>(block) + bytes, end,
        "guard allocator: written past the end of a block\n");
  mmap(begin, size_t(end - begin), PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

void* aligned(size_t alignment, size_t bytes) {
  void* block = alignment == kAlignment ? guarded(bytes) : nullptr;
  return block != nullptr ? block : __libc_memalign(alignment, bytes);
}

}  // namespace

extern "C" {

int posix_memalign(void** out, size_t alignment, size_t bytes) {
  *out = aligned(alignment, bytes);
  return *out == nullptr ? ENOMEM : 0;
}

void* memalign(size_t alignment, size_t bytes) { return aligned(alignment, bytes); }
void* aligned_alloc(size_t alignment, size_t bytes) { return aligned(alignment, bytes); }

void free(void* block) {
  if (region().holds(block)) {
    release(block);
  } else {
    __libc_free(block);
  }
}

void* realloc(void* block, size_t bytes) {
  if (!region().holds(block)) return __libc_realloc(block, bytes);
  const size_t before = region().size_of(block);
  void* moved = malloc(bytes);
  if (moved != nullptr) memcpy(moved, block, before < bytes ? before : bytes), release(block);
  return moved;
}

// How many blocks have been guarded: a test asks whether this allocator is in use.
size_t guard_allocator_pages() { return region().used.load() / kPage; }

}  // extern "C"
