// The linear layer on the CPU: three products on packed panels (common/cpu/gemm.h).
//
// Nothing is packed in a pass of its own: each operand becomes panels right before it is used, from
// either way that it can lie in memory. The bias is added to a tile of y while the tile is in L1.
// dx sums over all outputs, of which a vocabulary has many: in float32 it takes kDepth at a time,
// so that its packed rows of dy are no second copy of them.
//
// Compiled by cpu.cpp once per instruction set; no include guard.

#include "common/cpu/gemm.h"

namespace bigkern::linear::BIGKERN_ISA {
using namespace bigkern::BIGKERN_ISA;
namespace {

// Epilogue of y: tile + b.
template <class T>
struct BiasTile {
  T* y;
  int64_t N;
  const T* bias;  // null: 0

  void operator()(const Tile& tile) const {
    for (int r = 0; r < tile.rows; ++r) {
      T* out = y + (tile.i + r) * N + tile.j;
      for (int64_t j = 0; j < tile.columns; j += W) {
        const int64_t n = tile.columns - j;
        store_upto(out + j, load(tile.c + r * NR + j) + load_or(bias, tile.j + j, n, 0.0f), n);
      }
    }
  }
};

constexpr int64_t kDepth = 8192;
template <class T>
constexpr bool adds_in_parts = sizeof(T) == sizeof(float);  // others would round in between

// The plans of the products; dx's of its longest part.
struct Products {
  Plan y, dx, dweight;

  template <class T, class Params>
  static Products of(const Params& p, int threads, T) {
    const auto plan = [&](int64_t M, int64_t N, int64_t K)
                          BIGKERN_FN { return make_plan(M, N, K, words_of<T>(K), threads); };
    const bool rows = p.of_weight.column == 1;
    const int64_t depth = adds_in_parts<T> ? at_most(p.N, kDepth) : p.N;
    return {plan(p.M, p.N, p.K), plan(p.M, p.K, depth),
            rows ? plan(p.N, p.K, p.M) : plan(p.K, p.N, p.M)};
  }
};

template <class T>
const T* in(const void* p) {
  return static_cast<const T*>(p);
}

template <class T>
void linear(const LinearParams& p, const Parallel& parallel) {
  const Plan plan = Products::of(p, parallel.threads, T{}).y;
  prefer_large_pages(p.workspace, gemm_workspace(plan, parallel.threads) * sizeof(float));
  prefer_large_pages(p.y, size_t(p.M * p.N) * sizeof(T));
  const Matrix<T> x = {in<T>(p.x), p.K, 1};
  const Matrix<T> w = {in<T>(p.weight), p.of_weight.column, p.of_weight.row};
  gemm<T>(plan, x, w, BiasTile<T>{static_cast<T*>(p.y), p.N, in<T>(p.bias)},
          static_cast<float*>(p.workspace), parallel);
}

// dx = dy W, depth by depth.
template <class T>
void input_gradient(const LinearBackwardParams& p, Plan plan, const Parallel& parallel) {
  const int64_t depth = plan.K;
  for (int64_t n = 0; n < p.N; n += depth) {
    plan.K = at_most(depth, p.N - n);
    plan.words = words_of<T>(plan.K);
    const Matrix<T> dy = {in<T>(p.dy) + n, p.N, 1};
    const Matrix<T> w = {in<T>(p.weight) + n * p.of_weight.row, p.of_weight.row,
                         p.of_weight.column};
    gemm<T>(plan, dy, w, StoreTile<T>{static_cast<T*>(p.dx), p.K, n > 0},
            static_cast<float*>(p.workspace), parallel);
  }
}

template <class T>
void linear_backward(const LinearBackwardParams& p, const Parallel& parallel) {
  const Products plans = Products::of(p, parallel.threads, T{});
  float* workspace = static_cast<float*>(p.workspace);
  const T *dy = in<T>(p.dy), *x = in<T>(p.x);
  if (p.dx) input_gradient<T>(p, plans.dx, parallel);
  if (!p.dweight) return;
  T* dweight = static_cast<T*>(p.dweight);
  if (p.of_weight.column == 1) {
    gemm<T>(plans.dweight, {dy, 1, p.N}, {x, p.K, 1}, StoreTile<T>{dweight, p.K, false}, workspace,
            parallel);
  } else {
    gemm<T>(plans.dweight, {x, 1, p.K}, {dy, p.N, 1}, StoreTile<T>{dweight, p.N, false}, workspace,
            parallel);
  }
}

}  // namespace

size_t linear_workspace(const LinearParams& p, int threads) {
  return with_dtype(p.dtype, [&](auto t) BIGKERN_FN {
    return gemm_workspace(Products::of(p, threads, t).y, threads) * sizeof(float);
  });
}

size_t linear_backward_workspace(const LinearBackwardParams& p, int threads) {
  return with_dtype(p.dtype, [&](auto t) BIGKERN_FN {
    const Products plans = Products::of(p, threads, t);
    const size_t dx = p.dx ? gemm_workspace(plans.dx, threads) : 0;
    const size_t dweight = p.dweight ? gemm_workspace(plans.dweight, threads) : 0;
    return (dx > dweight ? dx : dweight) * sizeof(float);
  });
}

void linear(const LinearParams& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto t) BIGKERN_FN { linear<decltype(t)>(p, parallel); });
}

void linear_backward(const LinearBackwardParams& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto t) BIGKERN_FN { linear_backward<decltype(t)>(p, parallel); });
}

}  // namespace bigkern::linear::BIGKERN_ISA
