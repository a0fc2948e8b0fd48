// The products and functions that test_gemm.cpp calls. Compiled once per instruction set.

#include "common/cpu/gemm.inl"
#include "gemm_call.h"

namespace bigkern::gemm_test::BIGKERN_ISA {
using namespace bigkern::BIGKERN_ISA;
namespace {

template <class T>
struct Product {
  const Call& call;
  Plan plan;

  Product(const Call& c, int threads)
      : call(c), plan(make_plan(c.M, c.N, c.K, words_of<T>(c.K), threads)) {}

  void run(const Parallel& parallel) const {
    const Matrix<T> A = {static_cast<const T*>(call.A), call.a_row, call.a_column};
    const Matrix<T> B = {static_cast<const T*>(call.B), call.b_row, call.b_column};
    const StoreTile<float> store_tile = {call.C, call.N, call.accumulate};
    gemm<T>(plan, A, B, store_tile, call.workspace, parallel);
  }
};

template <class T, class F>
void map(const T* x, T* y, int64_t n, const F& f) {
  for (int64_t i = 0; i < n; i += W) {
    if (n - i >= W) {
      store(y + i, f(load(x + i)));
    } else {
      store_n(y + i, f(load_n(x + i, n - i)), n - i);
    }
  }
}

}  // namespace

void product(const Call& call, const Parallel& parallel) {
  if (call.dtype == Dtype::f32) Product<float>(call, parallel.threads).run(parallel);
  if (call.dtype == Dtype::bf16) Product<bf16>(call, parallel.threads).run(parallel);
  if (call.dtype == Dtype::f16) Product<fp16>(call, parallel.threads).run(parallel);
}

size_t workspace(const Call& call, int threads) {
  if (call.dtype == Dtype::bf16) return gemm_workspace(Product<bf16>(call, threads).plan, threads);
  return gemm_workspace(Product<float>(call, threads).plan, threads);
}

void elementary(Function function, const float* x, float* y, int64_t n) {
  switch (function) {
    case Function::exp:
      return map(x, y, n, [&](vf v) BIGKERN_FN { return exp(v); });
    case Function::exp2:
      return map(x, y, n, [&](vf v) BIGKERN_FN { return exp2(v); });
    case Function::log:
      return map(x, y, n, [&](vf v) BIGKERN_FN { return log(v); });
    case Function::tanh:
      return map(x, y, n, [&](vf v) BIGKERN_FN { return tanh(v); });
    case Function::normal_cdf:
      return map(x, y, n, [&](vf v) BIGKERN_FN { return normal_cdf(v); });
    case Function::sqrt:
      return map(x, y, n, [&](vf v) BIGKERN_FN { return sqrt(v); });
    case Function::sum:
      return map(x, y, n, [&](vf v) BIGKERN_FN { return set1(reduce_add(v)); });
    case Function::greatest:
      return map(x, y, n, [&](vf v) BIGKERN_FN { return set1(reduce_max(v)); });
  }
}

int width() { return W; }

// Widens n stored values and narrows them again.
void copy(Dtype dtype, const void* x, void* y, int64_t n) {
  const auto same = [&](vf v) BIGKERN_FN { return v; };
  if (dtype == Dtype::bf16) map(static_cast<const bf16*>(x), static_cast<bf16*>(y), n, same);
  if (dtype == Dtype::f16) map(static_cast<const fp16*>(x), static_cast<fp16*>(y), n, same);
}

void narrow(Dtype dtype, const float* x, void* y, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    const int64_t m = n - i < W ? n - i : W;
    if (dtype == Dtype::bf16) store_n(static_cast<bf16*>(y) + i, load_n(x + i, m), m);
    if (dtype == Dtype::f16) store_n(static_cast<fp16*>(y) + i, load_n(x + i, m), m);
  }
}

}  // namespace bigkern::gemm_test::BIGKERN_ISA
