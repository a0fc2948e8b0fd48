// The linear layer on the CPU: its contract, free of torch.
//
//   y  = x W^T + b          x [M, K], W [N, K], y [M, N]
//   dx = dy W               dW = dy^T x
//
// A weight may lie either way in memory, as torch.nn.Linear has it or transposed, and so may its
// gradient. The backward's x and dy may be some columns of wider matrices. M, N and K are at least
// 1. Launchers allocate nothing: workspace() says how many bytes
// they need.
#pragma once

#include <cstddef>

#include "common/dtypes.h"
#include "common/parallel.h"

namespace bigkern::linear {

// Element (n, k) of a weight is at data[n * row + k * column]; row or column is 1.
struct Strides {
  int64_t row, column;
};

struct LinearParams {
  Dtype dtype;
  int64_t M, N, K;
  const void* x;       // [M, K]
  const void* weight;  // [N, K]
  Strides of_weight;
  const void* bias;  // [N], null ok
  void* y;           // [M, N]
  void* workspace;
};

struct LinearBackwardParams {
  Dtype dtype;
  int64_t M, N, K;
  const void* dy;  // [M, N]
  int64_t dy_row;  // from one of its rows to the next
  const void* x;   // [M, K]
  int64_t x_row;
  const void* weight;  // [N, K]
  Strides of_weight;
  void* dx;       // [M, K], null ok: not wanted
  void* dweight;  // [N, K] of the weight's strides, null ok: not wanted
  void* workspace;
};

namespace cpu {
size_t linear_workspace(const LinearParams& params, int threads);
size_t linear_backward_workspace(const LinearBackwardParams& params, int threads);
void linear(const LinearParams& params, const Parallel& parallel);
void linear_backward(const LinearBackwardParams& params, const Parallel& parallel);
}  // namespace cpu

}  // namespace bigkern::linear
