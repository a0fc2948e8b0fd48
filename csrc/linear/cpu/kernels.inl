// The linear layer on the CPU: three products on packed panels (common/cpu/gemm.inl).
//
// Nothing is packed in a pass of its own: each operand becomes panels right before it is used, from
// either way that it can lie in memory. The bias is added to a tile of y while the tile is in L1.
// The backward's sums can be long, over a vocabulary's outputs or a batch's rows: in float32 they
// are taken in parts, whose packed operands stay in the caches instead of being a second copy.
//
// Compiled once per instruction set.

#include "common/cpu/gemm.inl"
#include "common/cpu/pages.h"
#include "linear/linear.h"

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

constexpr int64_t kOutputs = 8192, kRows = 1024;  // of a part: of dx's sums, of dweight's
template <class T>
constexpr int64_t part_of(int64_t K, int64_t most) {
  return sizeof(T) == sizeof(float) ? at_most(K, most) : K;  // others would round in between
}

// The plans of the products, of the longest part of each.
struct Products {
  Plan y, dx, dweight;

  template <class T, class Params>
  static Products of(const Params& p, int threads, T) {
    const auto plan = [&](int64_t M, int64_t N, int64_t K)
                          BIGKERN_FN { return make_plan(M, N, K, words_of<T>(K), threads); };
    const int64_t outputs = part_of<T>(p.N, kOutputs), rows = part_of<T>(p.M, kRows);
    return {plan(p.M, p.N, p.K), plan(p.M, p.K, outputs),
            p.of_weight.column == 1 ? plan(p.N, p.K, rows) : plan(p.K, p.N, rows)};
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

// C = A B over all of K, the plan's part of it at a time.
template <class T>
void sum_in_parts(Plan plan, int64_t K, Matrix<T> A, Matrix<T> B, T* C, float* workspace,
                  const Parallel& parallel) {
  const int64_t part = plan.K;
  for (int64_t k = 0; k < K; k += part) {
    plan.K = at_most(part, K - k);
    plan.words = words_of<T>(plan.K);
    gemm<T>(plan, A, B, StoreTile<T>{C, plan.N, k > 0}, workspace, parallel);
    A.data += part * A.column;
    B.data += part * B.row;
  }
}

template <class T>
void linear_backward(const LinearBackwardParams& p, const Parallel& parallel) {
  const Products plans = Products::of(p, parallel.threads, T{});
  float* workspace = static_cast<float*>(p.workspace);
  const Matrix<T> dY = {in<T>(p.dy), p.dy_row, 1}, X = {in<T>(p.x), p.x_row, 1};
  const Matrix<T> weight = {in<T>(p.weight), p.of_weight.row, p.of_weight.column};
  if (p.dx) {
    sum_in_parts<T>(plans.dx, p.N, dY, weight, static_cast<T*>(p.dx), workspace, parallel);
  }
  if (!p.dweight) return;
  const bool rows = p.of_weight.column == 1;
  sum_in_parts<T>(plans.dweight, p.M, (rows ? dY : X).transposed(), rows ? X : dY,
                  static_cast<T*>(p.dweight), workspace, parallel);
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
