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
// A barrier is for some of the team, as many as it is told. What happens between two steps takes a
// microsecond, which no sleeping thread could answer in, so threads spin. But a thread whose core
// is taken away comes back after milliseconds: who has spun for long sleeps, and what it waits for
// wakes it. Yielding instead would hand the core to the other process for as long again.
#pragma once

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace bigkern {

// The cores that this process may use: a team of more threads would wait for its own.
inline int cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return int(std::thread::hardware_concurrency());
}

using Clock = std::chrono::steady_clock;

// Where threads wait for something that another one brings about.
class Waiting {
 public:
  // Returns when done() holds, or at the deadline.
  template <class Done>
  void until(const Done& done, Clock::time_point deadline = Clock::time_point::max()) {
    if (spin(done)) return;
    const Clock::time_point begin = Clock::now();
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    if (deadline == Clock::time_point::max()) {
      awake_.wait(lock, done);
    } else {
      awake_.wait_until(lock, deadline, done);
    }
    sleepers_.fetch_sub(1);
    slept_.fetch_add((Clock::now() - begin).count());
  }

  // To be called after what makes done() hold. Costs a load where nobody sleeps.
  void wake() {
    if (sleepers_.load() == 0) return;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
    }  // a sleeper that has just asked is asleep now
    awake_.notify_all();
  }

  // Of all threads together.
  Clock::duration slept() const { return Clock::duration(slept_.load()); }

 private:
  static constexpr std::chrono::microseconds kSpin{50};

  template <class Done>
  static bool spin(const Done& done) {
    Clock::time_point end{};
    for (int spins = 0; !done(); ++spins) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
      if (spins % 64 != 63) continue;
      if (end == Clock::time_point{}) end = Clock::now() + kSpin;
      if (Clock::now() > end) return done();
    }
    return true;
  }

  std::atomic<int> sleepers_{0};
  std::atomic<Clock::rep> slept_{0};
  std::mutex mutex_;
  std::condition_variable awake_;
};

class Team {
 public:
  explicit Team(int indices) : indices_(indices) {}

  // The caller's number in the team, or -1 if the team has closed.
  int join(int64_t indices) {
    const uint64_t before = state_.fetch_add(kMember + uint64_t(indices));
    if (before & kClosed) return -1;
    const int me = members(before);
    if (int64_t(before & kIndices) + indices >= indices_) close();
    const auto is_closed = [&] { return closed(); };
    if (me == 0) {
      waiting_.until(is_closed, std::chrono::steady_clock::now() + kPatience);
      close();
    }
    waiting_.until(is_closed);
    return me;
  }

  int size() const { return size_.load(); }
  Clock::duration slept() const { return waiting_.slept(); }

 private:
  // State: closed, how many have joined, how many indices they bring.
  static constexpr uint64_t kClosed = uint64_t(1) << 63, kMember = uint64_t(1) << 32;
  static constexpr uint64_t kIndices = kMember - 1;
  static constexpr std::chrono::milliseconds kPatience{2};

  static int members(uint64_t state) { return int((state & ~kClosed) >> 32); }
  bool closed() const { return size_.load() > 0; }
  void close() {
    const uint64_t before = state_.fetch_or(kClosed);
    if (before & kClosed) return;
    size_.store(members(before));
    waiting_.wake();
  }

  const int64_t indices_;
  std::atomic<uint64_t> state_{0};
  std::atomic<int> size_{0};
  Waiting waiting_;
};

// On a cache line of its own. wait() returns when `count` threads are in it, again and again.
class alignas(64) Barrier {
 public:
  void wait(int count) {
    if (count == 1) return;
    const uint64_t arrived = arrived_.fetch_add(1);
    const uint64_t all = (arrived / uint64_t(count) + 1) * uint64_t(count);
    if (arrived + 1 == all) return waiting_.wake();
    waiting_.until([&] { return arrived_.load() >= all; });
  }
  Clock::duration slept() const { return waiting_.slept(); }

 private:
  std::atomic<uint64_t> arrived_{0};
  Waiting waiting_;
};

// Whether to work as a team or alone, by how the last calls went. Where other processes take cores
// away, each step waits for whoever has lost one, and one thread, which waits for nobody, is
// faster.
class TeamPolicy {
 public:
  // Asked once a call. After a team that did not pay some calls are done alone, then one tries
  // again.
  bool alone() {
    int left = alone_.load(std::memory_order_relaxed);
    while (left > 0 && !alone_.compare_exchange_weak(left, left - 1)) {
    }
    return left > 0;
  }

  // How a call went: one thread would have taken the time that all together did not sleep.
  void learn(int size, Clock::duration took, Clock::duration slept) {
    const bool paid = size * took - slept > took;
    const int penalty = paid ? 0 : std::min(2 * penalty_.load() + 1, kMost);
    penalty_.store(penalty);
    alone_.store(penalty);
  }

 private:
  static constexpr int kMost = 15;  // calls

  std::atomic<int> penalty_{0}, alone_{0};
};

// The process's.
inline TeamPolicy& team_policy() {
  static TeamPolicy policy;
  return policy;
}

}  // namespace bigkern
