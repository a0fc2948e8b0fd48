// The linear layer as torch ops: check, allocate, launch.
#include "common/op.h"

#include "linear/linear.h"

#ifndef BIGKERN_SIMT  // a CPU backend alone: on a GPU the product is stock's
namespace bigkern::linear {
namespace {

// A weight [N, K] that lies one way or the other; a copy of it if it does neither.
struct Weight {
  Tensor tensor;
  Strides strides;

  explicit Weight(const Tensor& weight)
      : tensor(rows(weight) || columns(weight) ? weight : dense(weight)),
        strides(rows(tensor) ? Strides{tensor.stride(0), 1} : Strides{1, tensor.stride(1)}) {}

  static bool rows(const Tensor& w) { return w.stride(1) == 1 && w.stride(0) >= w.size(1); }
  static bool columns(const Tensor& w) { return w.stride(0) == 1 && w.stride(1) >= w.size(0); }
};

// Rows of a matrix, which may be some columns of a wider one, or a copy of them.
struct Rows {
  Tensor tensor;
  int64_t row;

  explicit Rows(const Tensor& x)
      : tensor(x.dim() == 2 && Weight::rows(x) ? x : dense(x)),
        row(tensor.dim() == 2 ? tensor.stride(0) : tensor.size(tensor.dim() - 1)) {}
};

struct Sizes {
  int64_t M, N, K;
  std::vector<int64_t> of_y;  // [..., N]

  Sizes(const First& x, const Tensor& weight) {
    const Dims of_x = x.tensor.sizes();
    require(of_x.size() >= 1 && weight.dim() == 2, "x must be [..., K] and weight [N, K]");
    require(x.tensor.numel() > 0 && weight.numel() > 0, "x and weight must not be empty");
    N = weight.size(0), K = of_x.back(), M = x.tensor.numel() / K;
    check(weight, "weight", x, {N, K});
    of_y = {of_x.begin(), of_x.end()};
    of_y.back() = N;
  }
};

struct ForwardCall {
  Arguments& in;
  Tensor x = in.tensor(), weight = in.tensor();
  OptionalTensor bias = in.optional();
};

Tensor linear(const ForwardCall& call) {
  const First first(call.x, "x");
  const Sizes of(first, call.weight);
  check(call.bias, "bias", first, {of.N});
  const Tensor x = dense(call.x);
  const OptionalTensor bias = dense(call.bias);
  const Weight weight(call.weight);
  Tensor y = empty(x, of.of_y);
  LinearParams p = {};
  p.dtype = first.dtype, p.M = of.M, p.N = of.N, p.K = of.K;
  p.x = x.const_data_ptr();
  p.weight = weight.tensor.const_data_ptr(), p.of_weight = weight.strides;
  p.bias = data_or_null(bias), p.y = out(y);
  const Parallel parallel = torch_parallel();
  const Tensor workspace = empty_bytes(x, cpu::linear_workspace(p, parallel.threads));
  p.workspace = out(workspace);
  cpu::linear(p, parallel);
  return y;
}

struct BackwardCall {
  Arguments& in;
  Tensor dy = in.tensor(), x = in.tensor(), weight = in.tensor();
  bool want_x = in.flag(), want_weight = in.flag();
};

std::tuple<OptionalTensor, OptionalTensor> linear_backward(const BackwardCall& call) {
  const First first(call.x, "x");
  const Sizes of(first, call.weight);
  check(call.dy, "dy", first, of.of_y);
  const Rows dy(call.dy), x(call.x);
  const Weight weight(call.weight);
  const bool rows = weight.strides.column == 1;
  OptionalTensor dx, dweight;
  if (call.want_x) dx = empty(call.x, {call.x.sizes().begin(), call.x.sizes().end()});
  if (call.want_weight)
    dweight = empty(call.x, rows ? std::vector{of.N, of.K} : std::vector{of.K, of.N});
  LinearBackwardParams p = {};
  p.dtype = first.dtype, p.M = of.M, p.N = of.N, p.K = of.K;
  p.dy = dy.tensor.const_data_ptr(), p.dy_row = dy.row;
  p.x = x.tensor.const_data_ptr(), p.x_row = x.row;
  p.weight = weight.tensor.const_data_ptr(), p.of_weight = weight.strides;
  p.dx = out(dx), p.dweight = out(dweight);
  const Parallel parallel = torch_parallel();
  const Tensor workspace = empty_bytes(call.x, cpu::linear_backward_workspace(p, parallel.threads));
  p.workspace = out(workspace);
  cpu::linear_backward(p, parallel);
  if (call.want_weight && !rows) dweight = torch::stable::transpose(*dweight, 0, 1);
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bigkern_native, CPU, m) {
  m.impl("linear", &boxed<linear>);
  m.impl("linear_backward", &boxed<linear_backward>);
}

}  // namespace bigkern::linear
#endif
