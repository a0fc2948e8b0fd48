// The sum of the squares of a slice of all gradients, for one instruction set (see
// common/cpu/foreach_isa.h).
//
// Squares are added up in fp32, W wide and four deep, over at most kRun elements; the sums of those
// in double. A NaN or an infinity reaches the end.

namespace bigkern::adam::BIGKERN_ISA {
using namespace bigkern::BIGKERN_ISA;
namespace {

constexpr int64_t kRun = 4096;

template <class T>
float run_of_squares(const T* g, int64_t n) {
  vf sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    for (int k = 0; k < 4; ++k) {
      const vf x = load(g + i + k * W);
      sum[k] = fma(x, x, sum[k]);
    }
  }
  for (; i < n; i += W) {
    const vf x = load_n(g + i, n - i < W ? n - i : W);
    sum[0] = fma(x, x, sum[0]);
  }
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

}  // namespace

// Elements begin to end of the long row.
template <class T>
double squares(const Parameter* parameters, int64_t count, int64_t begin, int64_t end) {
  double sum = 0.0;
  for (int64_t i = parameter_at(parameters, count, begin); i < count; ++i) {
    const Parameter& x = parameters[i];
    if (x.before >= end) break;
    const int64_t to = cut(end, x);
    for (int64_t at = cut(begin, x); at < to; at += kRun) {
      sum +=
          double(run_of_squares(static_cast<const T*>(x.g) + at, at + kRun < to ? kRun : to - at));
    }
  }
  return sum;
}

}  // namespace bigkern::adam::BIGKERN_ISA
