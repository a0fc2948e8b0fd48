// The CPU vectors, their math, and the packed matrix product, on every instruction set there is.

#include <cmath>
#include <limits>
#include <random>

#include "check.h"
#include "common/dtypes.h"
#include "gemm_call.h"
#include "threads.h"

#define BIGKERN_KERNELS "gemm_kernels.inl"
#include "common/cpu/foreach_isa.h"

namespace bigkern::gemm_test {
namespace {

void (*const products[])(const Call&, const Parallel&) = BIGKERN_PER_ISA(product);
size_t (*const workspaces[])(const Call&, int) = BIGKERN_PER_ISA(workspace);
void (*const elementaries[])(Function, const float*, float*, int64_t) = BIGKERN_PER_ISA(elementary);
void (*const copies[])(Dtype, const void*, void*, int64_t) = BIGKERN_PER_ISA(copy);
void (*const narrows[])(Dtype, const float*, void*, int64_t) = BIGKERN_PER_ISA(narrow);
int (*const widths[])() = BIGKERN_PER_ISA(width);

const float nan = std::numeric_limits<float>::quiet_NaN();
const float infinity = std::numeric_limits<float>::infinity();

int levels() { return static_cast<int>(detected_isa()) + 1; }

// ---- elementary functions -----------------------------------------------------------------------

// The largest error over [low, high] in units of the last place of the result.
double worst_ulp(int level, Function function, double (*exact)(double), double low, double high) {
  const int n = 200001;
  std::vector<float> x(n), y(n, nan);
  for (int i = 0; i < n; ++i) x[size_t(i)] = float(low + (high - low) * i / (n - 1));
  elementaries[level](function, x.data(), y.data(), n);
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double want = exact(x[i]);
    if (std::isinf(float(want))) {
      CHECK_EQ(y[i], float(want));
      continue;
    }
    int exponent;
    std::frexp(want, &exponent);
    const double unit = std::ldexp(1.0, std::max(exponent - 24, -149));
    const double error = std::fabs(y[i] - want) / unit;
    CHECK(!std::isnan(error));
    worst = std::max(worst, error);
  }
  return worst;
}

TEST(elementary_functions_are_accurate) {
  for (int level = 0; level < levels(); ++level) {
    CHECK(worst_ulp(level, Function::exp, std::exp, -110, 95) < 1.5);
    CHECK(worst_ulp(level, Function::exp2, std::exp2, -155, 130) < 1.5);
    CHECK(worst_ulp(level, Function::log, std::log, 1e-3, 20) < 1.5);
    CHECK(worst_ulp(level, Function::log, std::log, 1e-44, 1e-36) < 1.5);
    CHECK(worst_ulp(level, Function::tanh, std::tanh, -12, 12) < 2);
    CHECK(worst_ulp(level, Function::tanh, std::tanh, -0.7, 0.7) < 2);
    CHECK(worst_ulp(level, Function::sqrt, std::sqrt, 0, 1e6) <= 0.5);
  }
}

TEST(the_normal_distribution_is_accurate) {
  const int n = 200001;
  std::vector<float> x(n), y(n, nan);
  for (int i = 0; i < n; ++i) x[size_t(i)] = -8 + 16 * float(i) / (n - 1);
  for (int level = 0; level < levels(); ++level) {
    elementaries[level](Function::normal_cdf, x.data(), y.data(), n);
    for (size_t i = 0; i < x.size(); ++i) {
      CHECK(std::fabs(y[i] - 0.5 * std::erfc(-x[i] / std::sqrt(2.0))) < 1.8e-7);
    }
  }
}

TEST(elementary_functions_at_the_edges) {
  const float x[] = {nan, infinity, -infinity, -1.0f};
  for (int level = 0; level < levels(); ++level) {
    const auto check = [&](Function function, float at_infinity, float at_minus,
                           bool negative_nan) {
      float y[4];
      elementaries[level](function, x, y, 4);
      CHECK(std::isnan(y[0]));
      CHECK_EQ(y[1], at_infinity);
      if (negative_nan) {
        CHECK(std::isnan(y[2]) && std::isnan(y[3]));
      } else {
        CHECK_EQ(y[2], at_minus);
      }
    };
    check(Function::exp, infinity, 0, false);
    check(Function::exp2, infinity, 0, false);
    check(Function::tanh, 1, -1, false);
    check(Function::normal_cdf, 1, 0, false);
    check(Function::log, infinity, 0, true);
    check(Function::sqrt, infinity, 0, true);
  }
}

TEST(reductions_see_every_lane) {
  for (int level = 0; level < levels(); ++level) {
    const int width = widths[level]();
    for (int lane = 0; lane < width; ++lane) {
      std::vector<float> x(size_t(width), -2.0f), y(size_t(width), nan);
      x[size_t(lane)] = 5.0f;
      elementaries[level](Function::sum, x.data(), y.data(), width);
      CHECK_EQ(y[0], 5.0f - 2.0f * float(width - 1));
      elementaries[level](Function::greatest, x.data(), y.data(), width);
      CHECK_EQ(y[0], 5.0f);
    }
  }
}

TEST(sixteen_bit_storage_round_trips) {
  for (int level = 0; level < levels(); ++level) {
    for (const Dtype dtype : {Dtype::bf16, Dtype::f16}) {
      const unsigned infinite = dtype == Dtype::bf16 ? 0x7f80 : 0x7c00;
      for (const size_t n : {size_t(65535), size_t(7), size_t(1)}) {
        std::vector<uint16_t> x(n), y(n + 1, 0xabcd);
        for (size_t i = 0; i < n; ++i) x[i] = uint16_t(i);
        copies[level](dtype, x.data(), y.data(), int64_t(n));
        for (size_t i = 0; i < n; ++i) {
          if ((x[i] & 0x7fffu) <= infinite) CHECK_EQ(y[i], x[i]);
          if ((x[i] & 0x7fffu) > infinite) CHECK((y[i] & 0x7fffu) > infinite);
        }
        CHECK_EQ(y[n], 0xabcd);  // nothing was written behind the end
      }
    }
  }
}

// Vectors and the scalar conversions of dtypes.h round alike.
TEST(sixteen_bit_storage_rounds_to_nearest_even) {
  std::mt19937 random(7);
  std::vector<float> x(100000);
  for (float& v : x) v = detail::bits_float(uint32_t(random()));
  for (int level = 0; level < levels(); ++level) {
    std::vector<uint16_t> y(x.size());
    narrows[level](Dtype::bf16, x.data(), y.data(), int64_t(x.size()));
    for (size_t i = 0; i < x.size(); ++i) {
      if (!std::isnan(x[i])) CHECK_EQ(y[i], from_float<bf16>(x[i]).bits);
    }
    narrows[level](Dtype::f16, x.data(), y.data(), int64_t(x.size()));
    for (size_t i = 0; i < x.size(); ++i) {
      if (!std::isnan(x[i])) CHECK_EQ(y[i], from_float<fp16>(x[i]).bits);
    }
  }
}

// ---- products -----------------------------------------------------------------------------------

enum class Order { rows, columns, strided };

// A [rows, columns] matrix of T in one of three layouts, its padding poisoned.
template <class T>
struct Stored {
  int64_t row = 1, column = 1;
  std::vector<T> data;

  Stored(int64_t rows, int64_t columns, Order order, std::mt19937& random) {
    if (order == Order::rows) row = columns + 3, column = 1;
    if (order == Order::columns) row = 1, column = rows + 5;
    if (order == Order::strided) row = 2 * columns + 1, column = 2;
    data.assign(size_t(rows * row + columns * column + 1), from_float<T>(nan));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        data[size_t(i * row + j * column)] = from_float<T>(normal(random));
      }
    }
  }
  double at(int64_t i, int64_t j) const { return to_float(data[size_t(i * row + j * column)]); }
};

template <class T>
void check_product(int64_t M, int64_t N, int64_t K, Order a_order, Order b_order, bool accumulate) {
  std::mt19937 random(unsigned(M * 7919 + N * 104729 + K));
  const Stored<T> A(M, K, a_order, random), B(K, N, b_order, random);
  std::vector<double> want(size_t(M * N), accumulate ? 1.0 : 0.0), size(size_t(M * N), 0.0);
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t j = 0; j < N; ++j) {
        want[size_t(i * N + j)] += A.at(i, k) * B.at(k, j);
        size[size_t(i * N + j)] += std::fabs(A.at(i, k) * B.at(k, j));
      }
    }
  }
  for (int level = 0; level < levels(); ++level) {
    for (const Parallel& parallel : {Parallel::serial(), std_threads<2>(), std_threads<5>()}) {
      std::vector<float> C(size_t(M * N), accumulate ? 1.0f : nan);
      Call call = {DtypeOf<T>::value, M,     N,        K,        A.data.data(), A.row,  A.column,
                   B.data.data(),     B.row, B.column, C.data(), accumulate,    nullptr};
      std::vector<float> workspace(workspaces[level](call, parallel.threads), nan);
      call.workspace = workspace.data();
      products[level](call, parallel);
      for (size_t i = 0; i < C.size(); ++i) {
        CHECK(std::fabs(C[i] - want[i]) <= 3e-6 * (size[i] + 1));
      }
    }
  }
}

template <class T>
void check_products() {
  constexpr Order orders[] = {Order::rows, Order::columns, Order::strided};
  for (const Order a : orders) {
    for (const Order b : orders) {
      check_product<T>(1, 1, 1, a, b, false);
      check_product<T>(7, 63, 129, a, b, false);
      check_product<T>(63, 129, 7, a, b, true);
      check_product<T>(33, 31, 515, a, b, false);
    }
  }
  check_product<T>(129, 7, 1023, Order::rows, Order::columns, false);
  check_product<T>(200, 300, 64, Order::rows, Order::columns, false);
  check_product<T>(200, 300, 64, Order::columns, Order::rows, true);
}

TEST(products_of_float) { check_products<float>(); }
TEST(products_of_bf16) { check_products<bf16>(); }
TEST(products_of_fp16) { check_products<fp16>(); }

TEST(an_empty_sum_is_zero) {
  for (int level = 0; level < levels(); ++level) {
    std::vector<float> C(6, nan), workspace(1 << 16, nan);
    const float none = 0;
    const Call call = {Dtype::f32, 2, 3,        0,     &none,           1, 1, &none,
                       1,          1, C.data(), false, workspace.data()};
    products[level](call, Parallel::serial());
    for (const float c : C) CHECK_EQ(c, 0.0f);
  }
}

}  // namespace
}  // namespace bigkern::gemm_test
