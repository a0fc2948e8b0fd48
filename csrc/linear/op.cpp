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

Tensor linear(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_) {
  const First first(x_, "x");
  const Sizes of(first, weight_);
  check(bias_, "bias", first, {of.N});
  const Tensor x = dense(x_);
  const OptionalTensor bias = dense(bias_);
  const Weight weight(weight_);
  Tensor y = empty(x, of.of_y);
  LinearParams p = {first.dtype,
                    of.M,
                    of.N,
                    of.K,
                    x.const_data_ptr(),
                    weight.tensor.const_data_ptr(),
                    weight.strides,
                    data_or_null(bias),
                    y.mutable_data_ptr(),
                    nullptr};
  const Parallel parallel = torch_parallel();
  const Tensor workspace = empty_bytes(x, cpu::linear_workspace(p, parallel.threads));
  p.workspace = workspace.mutable_data_ptr();
  cpu::linear(p, parallel);
  return y;
}

std::tuple<OptionalTensor, OptionalTensor> linear_backward(const Tensor& dy_, const Tensor& x_,
                                                           const Tensor& weight_, bool want_x,
                                                           bool want_weight) {
  const First first(x_, "x");
  const Sizes of(first, weight_);
  check(dy_, "dy", first, of.of_y);
  const Rows dy(dy_), x(x_);
  const Weight weight(weight_);
  const bool rows = weight.strides.column == 1;
  OptionalTensor dx, dweight;
  if (want_x) dx = empty(x_, {x_.sizes().begin(), x_.sizes().end()});
  if (want_weight) dweight = empty(x_, rows ? std::vector{of.N, of.K} : std::vector{of.K, of.N});
  LinearBackwardParams p = {first.dtype,
                            of.M,
                            of.N,
                            of.K,
                            dy.tensor.const_data_ptr(),
                            dy.row,
                            x.tensor.const_data_ptr(),
                            x.row,
                            weight.tensor.const_data_ptr(),
                            weight.strides,
                            want_x ? dx->mutable_data_ptr() : nullptr,
                            want_weight ? dweight->mutable_data_ptr() : nullptr,
                            nullptr};
  const Parallel parallel = torch_parallel();
  const Tensor workspace = empty_bytes(x_, cpu::linear_backward_workspace(p, parallel.threads));
  p.workspace = workspace.mutable_data_ptr();
  cpu::linear_backward(p, parallel);
  if (want_weight && !rows) dweight = torch::stable::transpose(*dweight, 0, 1);
  return {dx, dweight};
}

}  // namespace
}  // namespace bigkern::linear

STABLE_TORCH_LIBRARY_IMPL(bigkern_native, CPU, m) {
  m.impl("linear", TORCH_BOX(&bigkern::linear::linear));
  m.impl("linear_backward", TORCH_BOX(&bigkern::linear::linear_backward));
}
#endif
