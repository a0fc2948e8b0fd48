// The sum of the squares of a slice of all gradients. Compiled once per instruction set.
//
// A core that reads one stream waits for memory where it could wait for several. So a chunk of a
// gradient is read in four places at once:
//
//   chunk    |----> quarter 0 |----> quarter 1 |----> quarter 2 |----> quarter 3 | rest
//
// and of every four quarters' next kStretch elements the squares are added up in fp32, W wide; the
// sums of those in double. A NaN or an infinity reaches the end.

#include "adam/cpu/slices.h"

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "common/cpu/vec.inl"
#endif

namespace bigkern::adam::BIGKERN_ISA {
using namespace bigkern::BIGKERN_ISA;
namespace {

constexpr int64_t kChunk = 1 << 15;
constexpr int64_t kStretch = 1024;  // 4096 elements a sum in fp32

// Of n elements, a multiple of W, in each of four quarters.
template <class T>
float squares_of_quarters(const T* g, int64_t quarter, int64_t n) {
  vf sum[4] = {};
  for (int64_t i = 0; i < n; i += W) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const vf x = load(g + k * quarter + i);
      sum[k] = fma(x, x, sum[k]);
    }
  }
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T>
float squares_of_rest(const T* g, int64_t n) {
  vf sum = zero();
  for (int64_t i = 0; i < n; i += W) {
    const vf x = load_n(g + i, n - i < W ? n - i : W);
    sum = fma(x, x, sum);
  }
  return reduce_add(sum);
}

template <class T>
double squares_of_chunk(const T* g, int64_t n) {
  const int64_t quarter = n / (4 * W) * W;
  double sum = double(squares_of_rest(g + 4 * quarter, n - 4 * quarter));
  for (int64_t i = 0; i < quarter; i += kStretch) {
    const int64_t left = quarter - i;
    sum += double(squares_of_quarters(g + i, quarter, left < kStretch ? left : kStretch));
  }
  return sum;
}

}  // namespace

// Elements begin to end of the long row.
template <class T>
double squares(const Parameter* parameters, int64_t count, int64_t begin, int64_t end) {
  double sum = 0.0;
  for (int64_t i = parameter_at(parameters, count, begin); i < count; ++i) {
    const Parameter& x = parameters[i];
    if (x.before >= end) break;
    const T* const g = static_cast<const T*>(x.g);
    const int64_t to = cut(end, x);
    for (int64_t at = cut(begin, x); at < to; at += kChunk) {
      sum += squares_of_chunk(g + at, to - at < kChunk ? to - at : kChunk);
    }
  }
  return sum;
}

}  // namespace bigkern::adam::BIGKERN_ISA
