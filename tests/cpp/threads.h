// A Parallel on plain std::thread, for the tests of the CPU kernels.
#pragma once

#include <thread>
#include <vector>

#include "common/parallel.h"

namespace bigkern {

template <int THREADS>
inline Parallel std_threads() {
  const auto run = [](int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* ctx) {
    const int64_t chunks = (end - begin + grain - 1) / grain;
    const int64_t parts = chunks < THREADS ? chunks : THREADS;
    std::vector<std::thread> threads;
    for (int64_t part = 0; part < parts; ++part) {
      const Slice slice = slice_of(end - begin, grain, part, parts);
      threads.emplace_back([=] { body(begin + slice.begin, begin + slice.end, ctx); });
    }
    for (std::thread& thread : threads) thread.join();
  };
  return {run, THREADS};
}

}  // namespace bigkern
