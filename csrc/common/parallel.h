// How a torch-free CPU kernel gets threads without owning a pool.
//
// op.cpp fills a Parallel with torch's own parallel_for, so kernels share torch's threads and its
// thread count; the C++ tests fill it with serial() or with plain std::thread. The contract is
// torch's: `run` cuts [begin, end) into disjoint chunks of at least `grain` indices, calls `body`
// once for each, on any thread, and returns when all are done. A body must not throw and must not
// call for_range again.
#pragma once

#include <cstdint>

namespace bigkern {

struct Parallel {
  using Body = void (*)(int64_t begin, int64_t end, void* ctx);

  void (*run)(int64_t begin, int64_t end, int64_t grain, Body body, void* ctx);
  int threads;  // how many bodies may run at once; kernels size their per-thread scratch by it

  // Calls f(chunk_begin, chunk_end) over [begin, end).
  template <class F>
  void for_range(int64_t begin, int64_t end, int64_t grain, const F& f) const {
    if (begin >= end) return;
    const Body body = [](int64_t b, int64_t e, void* ctx) { (*static_cast<const F*>(ctx))(b, e); };
    run(begin, end, grain < 1 ? 1 : grain, body, const_cast<void*>(static_cast<const void*>(&f)));
  }

  // Calls f(worker) for worker = 0 .. threads-1: one index, one slice of scratch, one thread.
  template <class F>
  void for_workers(const F& f) const {
    for_range(0, threads, 1, [&f](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) f(static_cast<int>(worker));
    });
  }

  static Parallel serial() { return {&run_serially, 1}; }

 private:
  // A lambda would do, but nvcc 13.0 cannot compile it in a member function.
  static void run_serially(int64_t begin, int64_t end, int64_t, Body body, void* ctx) {
    body(begin, end, ctx);
  }
};

// Part `index` of `parts` of [0, count), in multiples of `step` so that tiles stay whole.
struct Slice {
  int64_t begin, end;
};

inline Slice slice_of(int64_t count, int64_t step, int64_t index, int64_t parts) {
  const int64_t tiles = (count + step - 1) / step;
  const int64_t begin = tiles * index / parts * step;
  const int64_t end = tiles * (index + 1) / parts * step;
  return {begin < count ? begin : count, end < count ? end : count};
}

}  // namespace bigkern
