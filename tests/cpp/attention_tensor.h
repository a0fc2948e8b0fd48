// A tensor of the attention tests that host and kernels see.
#pragma once

#include <cmath>
#include <random>

#include "attention/attention.h"
#include "device.h"

namespace bigkern::attention {

// [B, H, S, D] random numbers, or NaN, with `gap` unused elements after each row.
template <class T>
struct Tensor {
  Tensor(int64_t B, int64_t H, int64_t S, int64_t D, int gap, std::mt19937* random)
      : B(B), H(H), S(S), D(D), pitch(D + gap), values(int(B * H * S * (D + gap))) {
    std::normal_distribution<float> normal;
    for (int i = 0; random && i < values.size(); ++i) values[i] = from_float<T>(normal(*random));
  }
  int index(int64_t b, int64_t h, int64_t s, int64_t d) const {
    return int(((b * H + h) * S + s) * pitch + d);
  }
  double at(int64_t b, int64_t h, int64_t s, int64_t d) {
    return to_float(values[index(b, h, s, d)]);
  }

  template <class Pointer>
  View<Pointer> view() {
    return {values.data(), B == 1 ? 0 : H * S * pitch, S * pitch, pitch};
  }

  int64_t B, H, S, D, pitch;
  Buffer<T> values;
};

// Fails the test if a number is off by more than the tolerance, times its size where it is large.
inline void expect_near(double ours, double right, double tolerance) {
  if (ours == right) return;  // infinities
  if (!(std::abs(ours - right) <= tolerance * (1 + std::abs(right)))) {
    std::cerr << ours << " should be " << right << "\n";
  }
  CHECK(std::abs(ours - right) <= tolerance * (1 + std::abs(right)));
}

}  // namespace bigkern::attention
