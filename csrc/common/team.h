// Threads that work through many short steps together: who takes part, and a barrier.
//
// Parallel (parallel.h) promises that a body runs for every index, not that the bodies run at the
// same time; a barrier needs to know that they do. So a body joins a Team, which closes when all
// indices are there, or else after a while with those that are; who comes later finds it closed,
// and leaves its share to the others. A body that brings all the indices (one thread, or a parallel
// region inside another) is a team of one.
//
//   Team team(parallel.threads);
//   parallel.run(0, threads, 1, body):  const int me = team.join(end - begin);
//                                       if (me >= 0) work(me, team.size());
//
// A barrier is for some of the team, as many as it is told. They spin: what happens between two
// steps takes a microsecond, which no sleeping thread could answer in.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace bigkern {

// Waits until done() holds; gives the core away now and then if it takes long.
template <class Done>
inline void spin_until(const Done& done) {
  for (int64_t spins = 1; !done(); ++spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (spins % 256 == 0) std::this_thread::yield();
  }
}

class Team {
 public:
  explicit Team(int indices) : indices_(indices) {}

  // The caller's number in the team, or -1 if the team has closed.
  int join(int64_t indices) {
    const uint64_t before = state_.fetch_add(kMember + uint64_t(indices));
    if (before & kClosed) return -1;
    const int me = members(before);
    if (int64_t(before & kIndices) + indices >= indices_) close();
    if (me == 0) {
      const auto deadline = std::chrono::steady_clock::now() + kPatience;
      spin_until([&] { return closed() || std::chrono::steady_clock::now() > deadline; });
      close();
    }
    spin_until([&] { return closed(); });
    return me;
  }

  int size() const { return size_.load(); }

 private:
  // State: closed, how many have joined, how many indices they bring.
  static constexpr uint64_t kClosed = uint64_t(1) << 63, kMember = uint64_t(1) << 32;
  static constexpr uint64_t kIndices = kMember - 1;
  static constexpr std::chrono::milliseconds kPatience{2};

  static int members(uint64_t state) { return int((state & ~kClosed) >> 32); }
  bool closed() const { return size_.load() > 0; }
  void close() {
    const uint64_t before = state_.fetch_or(kClosed);
    if (!(before & kClosed)) size_.store(members(before));
  }

  const int64_t indices_;
  std::atomic<uint64_t> state_{0};
  std::atomic<int> size_{0};
};

// On a cache line of its own. wait() returns when `count` threads are in it, again and again.
class alignas(64) Barrier {
 public:
  void wait(int count) {
    if (count == 1) return;
    const uint64_t arrived = arrived_.fetch_add(1, std::memory_order_acq_rel);
    const uint64_t all = (arrived / uint64_t(count) + 1) * uint64_t(count);
    spin_until([&] { return arrived_.load(std::memory_order_acquire) >= all; });
  }

 private:
  std::atomic<uint64_t> arrived_{0};
};

}  // namespace bigkern
