// The norm and FFN ops as torch ops: check, allocate, launch.
#include "layernorm_ffn/op.h"

#include "layernorm_ffn/op_frozen.h"

namespace bigkern::layernorm_ffn {
namespace {

struct Cpu {
  static void run(const NormParams& p, const Tensor&) { cpu::norm_forward(p, torch_parallel()); }
  static void run(const NormBackwardParams& p, const Tensor&) {
    cpu::norm_backward(p, torch_parallel());
  }
  static size_t workspace(const NormBackwardParams& p) {
    return cpu::norm_backward_workspace(p, torch_parallel().threads);
  }
};

#ifdef BIGKERN_CUDA
struct Cuda {
  static void run(const NormParams& p, const Tensor& x) {
    launch_on_device(x, "norm", [&](void* stream) { return cuda::norm_forward(p, stream); });
  }
  static void run(const NormBackwardParams& p, const Tensor& x) {
    launch_on_device(x, "norm_backward",
                     [&](void* stream) { return cuda::norm_backward(p, stream); });
  }
  static size_t workspace(const NormBackwardParams& p) { return cuda::norm_backward_workspace(p); }
};
#endif

// ---- norm ---------------------------------------------------------------------------------------

template <class Device>
std::tuple<Tensor, OptionalTensor, OptionalTensor, Tensor> norm(
    const Tensor& x_, const OptionalTensor& residual_, const OptionalTensor& weight_,
    const OptionalTensor& bias_, double eps, const std::string& kind, double dropout_p,
    const OptionalTensor& dropout_key) {
  const First first(x_, "x");
  const auto [M, N] = rows_of(x_, "x");
  check(residual_, "residual", first, x_.sizes());
  check(weight_, "weight", first, {N});
  check(bias_, "bias", first, {N});
  const Norm norm = norm_of(kind);
  const Dropout dropout = dropout_of(dropout_key, dropout_p);
  require(residual_.has_value() || !dropout.active(), "dropout needs a residual");

  const Tensor x = dense(x_);
  const OptionalTensor residual = dense(residual_), weight = dense(weight_), bias = dense(bias_);
  Tensor y = empty(x, sizes_of(x));
  OptionalTensor sum = empty_if(residual.has_value(), x, sizes_of(x));
  OptionalTensor mean = empty_f32_if(norm == Norm::layer, x, M);
  Tensor rstd = empty_f32(x, {M});
  Device::run({first.dtype, M, N, norm, static_cast<float>(eps), x.const_data_ptr(),
               data_or_null(residual), data_or_null(weight), data_or_null(bias), out(y), out(sum),
               out_f32(mean), out_f32(rstd), dropout},
              x);
  return {y, sum, mean, rstd};
}

template <class Device>
std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor> norm_backward(
    const Tensor& dy_, const OptionalTensor& dsum_, const Tensor& s_, const OptionalTensor& weight_,
    const OptionalTensor& mean_, const Tensor& rstd_, const std::string& kind, bool want_weight,
    bool want_bias, double dropout_p, const OptionalTensor& dropout_key) {
  const First first(s_, "s");
  const auto [M, N] = rows_of(s_, "s");
  const Norm norm = norm_of(kind);
  const Dropout dropout = dropout_of(dropout_key, dropout_p);
  check(dy_, "dy", first, s_.sizes());
  check(dsum_, "dsum", first, s_.sizes());
  check(weight_, "weight", first, {N});
  check_f32(mean_, "mean", first, {M});
  check_f32(rstd_, "rstd", first, {M});
  require(mean_.has_value() == (norm == Norm::layer), "mean belongs to layer, and only to it");

  const Tensor dy = dense(dy_), s = dense(s_), rstd = dense(rstd_);
  const OptionalTensor dsum = dense(dsum_), weight = dense(weight_), mean = dense(mean_);
  Tensor ds = empty(s, sizes_of(s));
  OptionalTensor dx = empty_if(dropout.active(), s, sizes_of(s));
  OptionalTensor dweight = empty_if(want_weight, s, {N}), dbias = empty_if(want_bias, s, {N});
  NormBackwardParams p{first.dtype,
                       M,
                       N,
                       norm,
                       dy.const_data_ptr(),
                       data_or_null(dsum),
                       s.const_data_ptr(),
                       data_or_null(weight),
                       in_f32(mean),
                       in_f32(rstd),
                       out(ds),
                       out(dx),
                       out(dweight),
                       out(dbias),
                       nullptr,
                       dropout};
  const Tensor workspace = empty_bytes(s, Device::workspace(p));
  p.workspace = out(workspace);
  Device::run(p, s);
  return {ds, dx, dweight, dbias};
}

// ---- bias + activation: the GPU backends' pieces ------------------------------------------------

#ifdef BIGKERN_CUDA
// Adds the bias to the product in place, and returns the activation of that.
Tensor bias_activation(const Tensor& product, const OptionalTensor& bias_, const std::string& name,
                       double dropout_p, const OptionalTensor& dropout_key) {
  const First first(product, "product");
  const Activation activation = activation_of(name);
  const auto [M, columns] = rows_of(product, "product");
  check(bias_, "bias", first, {columns});
  require(product.is_contiguous(), "product must be contiguous: the bias is added in place");
  require(!is_gated(activation) || columns % 2 == 0, name, " needs an even number of columns");

  const int64_t F = is_gated(activation) ? columns / 2 : columns;
  const OptionalTensor bias = dense(bias_);
  Tensor activated = empty(product, {M, F});
  void* preactivation = bias.has_value() ? out(product) : nullptr;
  const BiasActivationParams p{first.dtype,
                               M,
                               F,
                               activation,
                               product.const_data_ptr(),
                               data_or_null(bias),
                               preactivation,
                               out(activated),
                               dropout_of(dropout_key, dropout_p)};
  launch_on_device(product, "bias_activation",
                   [&](void* stream) { return cuda::bias_activation(p, stream); });
  return activated;
}

std::tuple<Tensor, OptionalTensor, OptionalTensor> bias_activation_backward(
    const Tensor& dout_, const Tensor& preactivation_, const std::string& name, bool want_bias,
    bool rebuild, double dropout_p, const OptionalTensor& dropout_key) {
  const First first(preactivation_, "preactivation");
  const Activation activation = activation_of(name);
  const auto [M, columns] = rows_of(preactivation_, "preactivation");
  const int64_t F = is_gated(activation) ? columns / 2 : columns;
  check(dout_, "dout", first, {M, F});

  const Tensor dout = dense(dout_), preactivation = dense(preactivation_);
  Tensor dpre = empty(preactivation, {M, columns});
  OptionalTensor activated = empty_if(rebuild, preactivation, {M, F});
  OptionalTensor dbias = empty_if(want_bias, preactivation, {columns});
  BiasActivationBackwardParams p{first.dtype,
                                 M,
                                 F,
                                 activation,
                                 dout.const_data_ptr(),
                                 preactivation.const_data_ptr(),
                                 out(dpre),
                                 out(activated),
                                 out(dbias),
                                 nullptr,
                                 dropout_of(dropout_key, dropout_p)};
  const Tensor workspace = empty_bytes(dout, cuda::bias_activation_backward_workspace(p));
  p.workspace = out(workspace);
  launch_on_device(dout, "bias_activation_backward",
                   [&](void* stream) { return cuda::bias_activation_backward(p, stream); });
  return {dpre, activated, dbias};
}

Tensor dropout_add(const Tensor& x_, const OptionalTensor& residual_, double dropout_p,
                   const Tensor& dropout_key) {
  const First first(x_, "x");
  const auto [M, N] = rows_of(x_, "x");
  check(residual_, "residual", first, x_.sizes());
  const Tensor x = dense(x_);
  const OptionalTensor residual = dense(residual_);
  Tensor result = empty(x, sizes_of(x));
  const DropoutAddParams p{first.dtype,
                           M,
                           N,
                           x.const_data_ptr(),
                           data_or_null(residual),
                           out(result),
                           dropout_of(dropout_key, dropout_p)};
  launch_on_device(x, "dropout_add", [&](void* stream) { return cuda::dropout_add(p, stream); });
  return result;
}
#endif

// ---- the whole block: the CPU backend -----------------------------------------------------------

#ifndef BIGKERN_SIMT
std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor> layernorm_ffn(
    const Tensor& x_, const Tensor& w1_, const OptionalTensor& b1_, const Tensor& w2_,
    const OptionalTensor& b2_, const OptionalTensor& norm_weight_, const OptionalTensor& norm_bias_,
    const OptionalTensor& dropout_key, const std::string& kind, const std::string& activation_name,
    const std::string& placement_name, bool residual, double eps, double dropout_p,
    double hidden_dropout_p, const std::string& save_name) {
  const bool save = save_name == "preactivation";
  const Norm norm = norm_or_none_of(kind);
  const Activation activation = activation_of(activation_name);
  const Placement placement = placement_of(placement_name);
  const First first(x_, "x");
  const Sizes of(x_, w1_, w2_, activation);
  check(w1_, "w1", first, {of.rows, of.D});
  check(w2_, "w2", first, {of.D, of.F});
  check(b1_, "b1", first, {of.rows});
  check(b2_, "b2", first, {of.D});
  check(norm_weight_, "norm_weight", first, {of.D});
  check(norm_bias_, "norm_bias", first, {of.D});

  const Tensor x = dense(x_);
  const Lying w1(w1_, !is_gated(activation)), w2(w2_, true);
  const OptionalTensor b1 = dense(b1_), b2 = dense(b2_);
  const OptionalTensor norm_weight = dense(norm_weight_), norm_bias = dense(norm_bias_);
  Tensor y = empty(x, sizes_of(x));
  OptionalTensor s = empty_if(save && is_post(placement, norm), x, {of.M, of.D});
  OptionalTensor mean = empty_f32_if(save && norm == Norm::layer, x, of.M);
  OptionalTensor rstd = empty_f32_if(save && norm != Norm::none, x, of.M);
  OptionalTensor preactivation = empty_if(save, x, {of.M, of.rows});
  FfnParams p{first.dtype,
              of.M,
              of.D,
              of.F,
              norm,
              activation,
              placement,
              residual,
              static_cast<float>(eps),
              x.const_data_ptr(),
              data_or_null(norm_weight),
              data_or_null(norm_bias),
              w1.data(),
              data_or_null(b1),
              w2.data(),
              data_or_null(b2),
              out(y),
              out_f32(mean),
              out_f32(rstd),
              out(preactivation),
              out(s),
              nullptr,
              dropout_of(dropout_key, dropout_p),
              dropout_of(dropout_key, hidden_dropout_p)};
  p.w1_transposed = w1.transposed, p.w2_transposed = w2.transposed;
  const Parallel parallel = torch_parallel();
  const Tensor workspace = empty_bytes(x, cpu::ffn_forward_workspace(p, parallel.threads));
  p.workspace = out(workspace);
  cpu::ffn_forward(p, parallel);
  return {y, s, mean, rstd, preactivation};
}

using Gradients = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
                             OptionalTensor, OptionalTensor, OptionalTensor>;

Gradients layernorm_ffn_backward(
    const Tensor& dy_, const Tensor& x_, const Tensor& w1_, const OptionalTensor& b1_,
    const Tensor& w2_, const OptionalTensor& b2_, const OptionalTensor& norm_weight_,
    const OptionalTensor& norm_bias_, const OptionalTensor& dropout_key, const OptionalTensor& s_,
    const OptionalTensor& mean_, const OptionalTensor& rstd_, const OptionalTensor& preactivation_,
    const std::string& kind, const std::string& activation_name, const std::string& placement_name,
    bool residual, double eps, double dropout_p, double hidden_dropout_p,
    const std::vector<bool>& wanted, const OptionalTensor& w1_sum, const OptionalTensor& w2_sum) {
  if (!preactivation_.has_value()) {  // nothing but x was saved: the forward again
    const auto [y, s, mean, rstd, preactivation] = layernorm_ffn(
        x_, w1_, b1_, w2_, b2_, norm_weight_, norm_bias_, dropout_key, kind, activation_name,
        placement_name, residual, eps, dropout_p, hidden_dropout_p, "preactivation");
    return layernorm_ffn_backward(dy_, x_, w1_, b1_, w2_, b2_, norm_weight_, norm_bias_,
                                  dropout_key, s, mean, rstd, preactivation, kind, activation_name,
                                  placement_name, residual, eps, dropout_p, hidden_dropout_p,
                                  wanted, w1_sum, w2_sum);
  }
  const Norm norm = norm_or_none_of(kind);
  const Activation activation = activation_of(activation_name);
  const Placement placement = placement_of(placement_name);
  const First first(x_, "x");
  const Sizes of(x_, w1_, w2_, activation);
  check(w1_, "w1", first, {of.rows, of.D});
  check(w2_, "w2", first, {of.D, of.F});
  check(dy_, "dy", first, x_.sizes());
  check(b1_, "b1", first, {of.rows});
  check(b2_, "b2", first, {of.D});
  check(norm_weight_, "norm_weight", first, {of.D});
  check(norm_bias_, "norm_bias", first, {of.D});
  check(s_, "s", first, {of.M, of.D});
  check_f32(mean_, "mean", first, {of.M});
  check_f32(rstd_, "rstd", first, {of.M});
  check(preactivation_, "preactivation", first, {of.M, of.rows});
  require(mean_.has_value() == (norm == Norm::layer), "mean belongs to layer, and only to it");
  require(s_.has_value() == is_post(placement, norm), "s belongs to post, and only to it");
  require(rstd_.has_value() == (norm != Norm::none), "rstd belongs to a norm");
  require(wanted.size() == 7, "wanted must have 7 entries, not ", wanted.size());

  const Tensor dy = dense(dy_), x = dense(x_);
  const Lying w1(w1_, !is_gated(activation) && !w1_sum.has_value());
  const Lying w2(w2_, !w2_sum.has_value());
  const Tensor preactivation = dense(*preactivation_);
  const OptionalTensor norm_weight = dense(norm_weight_), norm_bias = dense(norm_bias_);
  const OptionalTensor s = dense(s_), mean = dense(mean_), rstd = dense(rstd_);
  OptionalTensor dx = empty_if(wanted[0], x, sizes_of(x));
  OptionalTensor dw1 = w1.gradient_if(wanted[1] && !w1_sum.has_value());
  OptionalTensor dw2 = w2.gradient_if(wanted[3] && !w2_sum.has_value());
  OptionalTensor db1 = empty_if(wanted[2], x, {of.rows}), db2 = empty_if(wanted[4], x, {of.D});
  OptionalTensor dweight = empty_if(wanted[5], x, {of.D}), dbias = empty_if(wanted[6], x, {of.D});
  FfnBackwardParams p{first.dtype,
                      of.M,
                      of.D,
                      of.F,
                      norm,
                      activation,
                      placement,
                      residual,
                      dy.const_data_ptr(),
                      x.const_data_ptr(),
                      data_or_null(norm_weight),
                      data_or_null(norm_bias),
                      w1.data(),
                      w2.data(),
                      in_f32(mean),
                      in_f32(rstd),
                      preactivation.const_data_ptr(),
                      data_or_null(s),
                      out(dx),
                      out(dweight),
                      out(dbias),
                      out(dw1),
                      out(db1),
                      out(dw2),
                      out(db2),
                      nullptr,
                      dropout_of(dropout_key, dropout_p),
                      dropout_of(dropout_key, hidden_dropout_p),
                      wanted[1] ? sum_of(w1_sum, "w1_sum", first, {of.rows, of.D}) : nullptr,
                      wanted[3] ? sum_of(w2_sum, "w2_sum", first, {of.D, of.F}) : nullptr,
                      w1.transposed,
                      w2.transposed};
  const Parallel parallel = torch_parallel();
  const Tensor workspace = empty_bytes(x, cpu::ffn_backward_workspace(p, parallel.threads));
  p.workspace = out(workspace);
  cpu::ffn_backward(p, parallel);
  return {dx, dw1, db1, dw2, db2, dweight, dbias};
}
#endif

}  // namespace
}  // namespace bigkern::layernorm_ffn

namespace ffn = bigkern::layernorm_ffn;

#ifdef BIGKERN_SIMT
STABLE_TORCH_LIBRARY_IMPL(bigkern_simt, CPU, m) {
  m.impl("norm", TORCH_BOX(&ffn::norm<ffn::Cuda>));
  m.impl("norm_backward", TORCH_BOX(&ffn::norm_backward<ffn::Cuda>));
  m.impl("dropout_add", TORCH_BOX(&ffn::dropout_add));
  m.impl("bias_activation", TORCH_BOX(&ffn::bias_activation));
  m.impl("bias_activation_backward", TORCH_BOX(&ffn::bias_activation_backward));
}
#else
STABLE_TORCH_LIBRARY_IMPL(bigkern_native, CPU, m) {
  m.impl("norm", TORCH_BOX(&ffn::norm<ffn::Cpu>));
  m.impl("norm_backward", TORCH_BOX(&ffn::norm_backward<ffn::Cpu>));
  m.impl("layernorm_ffn", TORCH_BOX(&ffn::layernorm_ffn));
  m.impl("layernorm_ffn_backward", TORCH_BOX(&ffn::layernorm_ffn_backward));
  m.impl("frozen_layernorm_ffn", TORCH_BOX(&ffn::frozen_layernorm_ffn));
  m.impl("pack_ffn_weight", TORCH_BOX(&ffn::pack_ffn_weight));
}
#ifdef BIGKERN_CUDA
STABLE_TORCH_LIBRARY_IMPL(bigkern_native, CUDA, m) {
  m.impl("norm", TORCH_BOX(&ffn::norm<ffn::Cuda>));
  m.impl("norm_backward", TORCH_BOX(&ffn::norm_backward<ffn::Cuda>));
  m.impl("dropout_add", TORCH_BOX(&ffn::dropout_add));
  m.impl("bias_activation", TORCH_BOX(&ffn::bias_activation));
  m.impl("bias_activation_backward", TORCH_BOX(&ffn::bias_activation_backward));
}
#endif
#endif
