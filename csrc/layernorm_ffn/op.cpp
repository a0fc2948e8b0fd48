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
  static void run(const BiasActivationParams& p, const Tensor&) {
    cpu::bias_activation(p, torch_parallel());
  }
  static void run(const BiasActivationBackwardParams& p, const Tensor&) {
    cpu::bias_activation_backward(p, torch_parallel());
  }
  static void run(const DropoutAddParams& p, const Tensor&) {
    cpu::dropout_add(p, torch_parallel());
  }
  static size_t workspace(const NormBackwardParams& p) {
    return cpu::norm_backward_workspace(p, torch_parallel().threads);
  }
  static size_t workspace(const BiasActivationBackwardParams& p) {
    return cpu::bias_activation_backward_workspace(p, torch_parallel().threads);
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
  static void run(const BiasActivationParams& p, const Tensor& x) {
    launch_on_device(x, "bias_activation",
                     [&](void* stream) { return cuda::bias_activation(p, stream); });
  }
  static void run(const BiasActivationBackwardParams& p, const Tensor& x) {
    launch_on_device(x, "bias_activation_backward",
                     [&](void* stream) { return cuda::bias_activation_backward(p, stream); });
  }
  static void run(const DropoutAddParams& p, const Tensor& x) {
    launch_on_device(x, "dropout_add", [&](void* stream) { return cuda::dropout_add(p, stream); });
  }
  static size_t workspace(const NormBackwardParams& p) { return cuda::norm_backward_workspace(p); }
  static size_t workspace(const BiasActivationBackwardParams& p) {
    return cuda::bias_activation_backward_workspace(p);
  }
};
#endif

// ---- norm ---------------------------------------------------------------------------------------

struct NormCall {
  Arguments& in;
  Tensor x = in.tensor();
  OptionalTensor residual = in.optional(), weight = in.optional(), bias = in.optional();
  double eps = in.real();
  std::string kind = in.text();
  double dropout_p = in.real();
  OptionalTensor dropout_key = in.optional();
};

template <class Device>
std::tuple<Tensor, OptionalTensor, OptionalTensor, Tensor> norm(const NormCall& call) {
  const First first(call.x, "x");
  const auto [M, N] = rows_of(call.x, "x");
  check(call.residual, "residual", first, call.x.sizes());
  check(call.weight, "weight", first, {N});
  check(call.bias, "bias", first, {N});
  NormParams p = {};
  p.dtype = first.dtype, p.M = M, p.N = N, p.norm = norm_of(call.kind);
  p.eps = static_cast<float>(call.eps);
  p.dropout = dropout_of(call.dropout_key, call.dropout_p);
  require(call.residual.has_value() || !p.dropout.active(), "dropout needs a residual");

  const Tensor x = dense(call.x);
  const OptionalTensor residual = dense(call.residual);
  const OptionalTensor weight = dense(call.weight), bias = dense(call.bias);
  Tensor y = empty(x, sizes_of(x));
  OptionalTensor sum = empty_if(residual.has_value(), x, sizes_of(x));
  OptionalTensor mean = empty_f32_if(p.norm == Norm::layer, x, M);
  Tensor rstd = empty_f32(x, {M});
  p.x = x.const_data_ptr(), p.residual = data_or_null(residual);
  p.weight = data_or_null(weight), p.bias = data_or_null(bias);
  p.y = out(y), p.sum = out(sum), p.mean = out_f32(mean), p.rstd = out_f32(rstd);
  Device::run(p, x);
  return {y, sum, mean, rstd};
}

struct NormBackwardCall {
  Arguments& in;
  Tensor dy = in.tensor();
  OptionalTensor dsum = in.optional();
  Tensor s = in.tensor();
  OptionalTensor weight = in.optional(), mean = in.optional();
  Tensor rstd = in.tensor();
  std::string kind = in.text();
  bool want_weight = in.flag(), want_bias = in.flag();
  double dropout_p = in.real();
  OptionalTensor dropout_key = in.optional();
};

template <class Device>
std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor> norm_backward(
    const NormBackwardCall& call) {
  const First first(call.s, "s");
  const auto [M, N] = rows_of(call.s, "s");
  NormBackwardParams p = {};
  p.dtype = first.dtype, p.M = M, p.N = N, p.norm = norm_of(call.kind);
  p.dropout = dropout_of(call.dropout_key, call.dropout_p);
  check(call.dy, "dy", first, call.s.sizes());
  check(call.dsum, "dsum", first, call.s.sizes());
  check(call.weight, "weight", first, {N});
  check_f32(call.mean, "mean", first, {M});
  check_f32(call.rstd, "rstd", first, {M});
  require(call.mean.has_value() == (p.norm == Norm::layer),
          "mean belongs to layer, and only to it");

  const Tensor dy = dense(call.dy), s = dense(call.s), rstd = dense(call.rstd);
  const OptionalTensor dsum = dense(call.dsum);
  const OptionalTensor weight = dense(call.weight), mean = dense(call.mean);
  Tensor ds = empty(s, sizes_of(s));
  OptionalTensor dx = empty_if(p.dropout.active(), s, sizes_of(s));
  OptionalTensor dweight = empty_if(call.want_weight, s, {N});
  OptionalTensor dbias = empty_if(call.want_bias, s, {N});
  p.dy = dy.const_data_ptr(), p.dsum = data_or_null(dsum), p.s = s.const_data_ptr();
  p.weight = data_or_null(weight), p.mean = in_f32(mean), p.rstd = in_f32(rstd);
  p.ds = out(ds), p.dx = out(dx), p.dweight = out(dweight), p.dbias = out(dbias);
  const Tensor workspace = empty_bytes(s, Device::workspace(p));
  p.workspace = out(workspace);
  Device::run(p, s);
  return {ds, dx, dweight, dbias};
}

// ---- the passes around products that a library made ---------------------------------------------

struct BiasActivationCall {
  Arguments& in;
  Tensor product = in.tensor();
  OptionalTensor bias = in.optional();
  std::string activation = in.text();
  double dropout_p = in.real();
  OptionalTensor dropout_key = in.optional();
};

// Adds the bias to the product in place, and returns the activation of that.
template <class Device>
Tensor bias_activation(const BiasActivationCall& call) {
  const Tensor& product = call.product;
  const First first(product, "product");
  const Activation activation = activation_of(call.activation);
  const auto [M, columns] = rows_of(product, "product");
  check(call.bias, "bias", first, {columns});
  require(product.is_contiguous(), "product must be contiguous: the bias is added in place");
  require(!is_gated(activation) || columns % 2 == 0, call.activation,
          " needs an even number of columns");

  const int64_t F = is_gated(activation) ? columns / 2 : columns;
  const OptionalTensor bias = dense(call.bias);
  Tensor activated = empty(product, {M, F});
  BiasActivationParams p = {};
  p.dtype = first.dtype, p.M = M, p.F = F, p.activation = activation;
  p.product = product.const_data_ptr(), p.bias = data_or_null(bias);
  if (bias.has_value()) p.preactivation = out(product);
  p.out = out(activated);
  p.dropout = dropout_of(call.dropout_key, call.dropout_p);
  Device::run(p, product);
  return activated;
}

struct BiasActivationBackwardCall {
  Arguments& in;
  Tensor dout = in.tensor(), preactivation = in.tensor();
  std::string activation = in.text();
  bool want_bias = in.flag(), rebuild = in.flag();
  double dropout_p = in.real();
  OptionalTensor dropout_key = in.optional();
};

template <class Device>
std::tuple<Tensor, OptionalTensor, OptionalTensor> bias_activation_backward(
    const BiasActivationBackwardCall& call) {
  const First first(call.preactivation, "preactivation");
  const Activation activation = activation_of(call.activation);
  const auto [M, columns] = rows_of(call.preactivation, "preactivation");
  const int64_t F = is_gated(activation) ? columns / 2 : columns;
  check(call.dout, "dout", first, {M, F});

  const Tensor dout = dense(call.dout), preactivation = dense(call.preactivation);
  Tensor dpre = empty(preactivation, {M, columns});
  OptionalTensor activated = empty_if(call.rebuild, preactivation, {M, F});
  OptionalTensor dbias = empty_if(call.want_bias, preactivation, {columns});
  BiasActivationBackwardParams p = {};
  p.dtype = first.dtype, p.M = M, p.F = F, p.activation = activation;
  p.dout = dout.const_data_ptr(), p.preactivation = preactivation.const_data_ptr();
  p.dpre = out(dpre), p.out = out(activated), p.dbias = out(dbias);
  p.dropout = dropout_of(call.dropout_key, call.dropout_p);
  const Tensor workspace = empty_bytes(dout, Device::workspace(p));
  p.workspace = out(workspace);
  Device::run(p, dout);
  return {dpre, activated, dbias};
}

struct DropoutAddCall {
  Arguments& in;
  Tensor x = in.tensor();
  OptionalTensor residual = in.optional();
  double dropout_p = in.real();
  Tensor dropout_key = in.tensor();
};

template <class Device>
Tensor dropout_add(const DropoutAddCall& call) {
  const First first(call.x, "x");
  const auto [M, N] = rows_of(call.x, "x");
  check(call.residual, "residual", first, call.x.sizes());
  const Tensor x = dense(call.x);
  const OptionalTensor residual = dense(call.residual);
  Tensor result = empty(x, sizes_of(x));
  DropoutAddParams p = {};
  p.dtype = first.dtype, p.M = M, p.N = N;
  p.x = x.const_data_ptr(), p.residual = data_or_null(residual), p.out = out(result);
  p.dropout = dropout_of(call.dropout_key, call.dropout_p);
  Device::run(p, x);
  return result;
}

// ---- the whole block: the CPU backend -----------------------------------------------------------

#ifndef BIGKERN_SIMT
struct Tensors {
  Arguments& in;
  Tensor x = in.tensor(), w1 = in.tensor();
  OptionalTensor b1 = in.optional();
  Tensor w2 = in.tensor();
  OptionalTensor b2 = in.optional();
  OptionalTensor norm_weight = in.optional(), norm_bias = in.optional();
  OptionalTensor dropout_key = in.optional();

  Sizes sizes(const First& first, Activation activation) const {
    const Sizes of(x, w1, w2, activation);
    check(w1, "w1", first, {of.rows, of.D});
    check(w2, "w2", first, {of.D, of.F});
    check(b1, "b1", first, {of.rows});
    check(b2, "b2", first, {of.D});
    check(norm_weight, "norm_weight", first, {of.D});
    check(norm_bias, "norm_bias", first, {of.D});
    return of;
  }
};

struct Probabilities {
  Arguments& in;
  double dropout_p = in.real(), hidden_dropout_p = in.real();
};

using Forward = std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;

Forward forward(const Tensors& given, const Form& form, const Probabilities& drop, bool save) {
  FfnParams p = {};
  p.norm = norm_or_none_of(form.norm);
  p.activation = activation_of(form.activation);
  p.placement = placement_of(form.placement);
  p.residual = form.residual, p.eps = static_cast<float>(form.eps);
  const First first(given.x, "x");
  const Sizes of = given.sizes(first, p.activation);
  p.dtype = first.dtype, p.M = of.M, p.D = of.D, p.F = of.F;

  const Tensor x = dense(given.x);
  const Lying w1(given.w1, !is_gated(p.activation)), w2(given.w2, true);
  const OptionalTensor b1 = dense(given.b1), b2 = dense(given.b2);
  const OptionalTensor norm_weight = dense(given.norm_weight), norm_bias = dense(given.norm_bias);
  Tensor y = empty(x, sizes_of(x));
  OptionalTensor s = empty_if(save && is_post(p.placement, p.norm), x, {of.M, of.D});
  OptionalTensor mean = empty_f32_if(save && p.norm == Norm::layer, x, of.M);
  OptionalTensor rstd = empty_f32_if(save && p.norm != Norm::none, x, of.M);
  OptionalTensor preactivation = empty_if(save, x, {of.M, of.rows});
  p.x = x.const_data_ptr();
  p.norm_weight = data_or_null(norm_weight), p.norm_bias = data_or_null(norm_bias);
  p.w1 = w1.data(), p.w1_transposed = w1.transposed, p.b1 = data_or_null(b1);
  p.w2 = w2.data(), p.w2_transposed = w2.transposed, p.b2 = data_or_null(b2);
  p.y = out(y), p.s = out(s), p.mean = out_f32(mean), p.rstd = out_f32(rstd);
  p.preactivation = out(preactivation);
  p.dropout = dropout_of(given.dropout_key, drop.dropout_p);
  p.hidden_dropout = dropout_of(given.dropout_key, drop.hidden_dropout_p);
  const Parallel parallel = torch_parallel();
  const Tensor workspace = empty_bytes(x, cpu::ffn_forward_workspace(p, parallel.threads));
  p.workspace = out(workspace);
  cpu::ffn_forward(p, parallel);
  return {y, s, mean, rstd, preactivation};
}

struct ForwardCall {
  Arguments& in;
  Tensors tensors{in};
  Form form{in};
  Probabilities drop{in};
  std::string save = in.text();
};

Forward layernorm_ffn(const ForwardCall& call) {
  return forward(call.tensors, call.form, call.drop, call.save == "preactivation");
}

struct BackwardCall {
  Arguments& in;
  Tensor dy = in.tensor();
  Tensors tensors{in};
  OptionalTensor s = in.optional(), mean = in.optional(), rstd = in.optional();
  OptionalTensor preactivation = in.optional();
  Form form{in};
  Probabilities drop{in};
  std::vector<bool> wanted = in.flags();
  OptionalTensor w1_sum = in.optional(), w2_sum = in.optional();
};

using Gradients = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
                             OptionalTensor, OptionalTensor, OptionalTensor>;

Gradients layernorm_ffn_backward(BackwardCall& call) {
  const Tensors& given = call.tensors;
  if (!call.preactivation.has_value()) {  // nothing but x was saved: the forward again
    std::tie(std::ignore, call.s, call.mean, call.rstd, call.preactivation) =
        forward(given, call.form, call.drop, true);
  }
  FfnBackwardParams p = {};
  p.norm = norm_or_none_of(call.form.norm);
  p.activation = activation_of(call.form.activation);
  p.placement = placement_of(call.form.placement);
  p.residual = call.form.residual;
  const First first(given.x, "x");
  const Sizes of = given.sizes(first, p.activation);
  p.dtype = first.dtype, p.M = of.M, p.D = of.D, p.F = of.F;
  check(call.dy, "dy", first, given.x.sizes());
  check(call.s, "s", first, {of.M, of.D});
  check_f32(call.mean, "mean", first, {of.M});
  check_f32(call.rstd, "rstd", first, {of.M});
  check(call.preactivation, "preactivation", first, {of.M, of.rows});
  require(call.mean.has_value() == (p.norm == Norm::layer),
          "mean belongs to layer, and only to it");
  require(call.s.has_value() == is_post(p.placement, p.norm), "s belongs to post, and only to it");
  require(call.rstd.has_value() == (p.norm != Norm::none), "rstd belongs to a norm");
  const std::vector<bool>& wanted = call.wanted;
  require(wanted.size() == 7, "wanted must have 7 entries, not ", wanted.size());

  const Tensor dy = dense(call.dy), x = dense(given.x);
  const bool add_w1 = call.w1_sum.has_value(), add_w2 = call.w2_sum.has_value();
  const Lying w1(given.w1, !is_gated(p.activation) && !add_w1), w2(given.w2, !add_w2);
  const Tensor preactivation = dense(*call.preactivation);
  const OptionalTensor norm_weight = dense(given.norm_weight), norm_bias = dense(given.norm_bias);
  const OptionalTensor s = dense(call.s), mean = dense(call.mean), rstd = dense(call.rstd);
  OptionalTensor dx = empty_if(wanted[0], x, sizes_of(x));
  OptionalTensor dw1 = w1.gradient_if(wanted[1] && !add_w1);
  OptionalTensor dw2 = w2.gradient_if(wanted[3] && !add_w2);
  OptionalTensor db1 = empty_if(wanted[2], x, {of.rows}), db2 = empty_if(wanted[4], x, {of.D});
  OptionalTensor dweight = empty_if(wanted[5], x, {of.D}), dbias = empty_if(wanted[6], x, {of.D});
  p.dy = dy.const_data_ptr(), p.x = x.const_data_ptr();
  p.norm_weight = data_or_null(norm_weight), p.norm_bias = data_or_null(norm_bias);
  p.w1 = w1.data(), p.w1_transposed = w1.transposed;
  p.w2 = w2.data(), p.w2_transposed = w2.transposed;
  p.mean = in_f32(mean), p.rstd = in_f32(rstd), p.s = data_or_null(s);
  p.preactivation = preactivation.const_data_ptr();
  p.dx = out(dx), p.dnorm_weight = out(dweight), p.dnorm_bias = out(dbias);
  p.dw1 = out(dw1), p.db1 = out(db1), p.dw2 = out(dw2), p.db2 = out(db2);
  if (wanted[1]) p.w1_sum = sum_of(call.w1_sum, "w1_sum", first, {of.rows, of.D});
  if (wanted[3]) p.w2_sum = sum_of(call.w2_sum, "w2_sum", first, {of.D, of.F});
  p.dropout = dropout_of(given.dropout_key, call.drop.dropout_p);
  p.hidden_dropout = dropout_of(given.dropout_key, call.drop.hidden_dropout_p);
  const Parallel parallel = torch_parallel();
  const Tensor workspace = empty_bytes(x, cpu::ffn_backward_workspace(p, parallel.threads));
  p.workspace = out(workspace);
  cpu::ffn_backward(p, parallel);
  return {dx, dw1, db1, dw2, db2, dweight, dbias};
}
#endif

template <class Device, class Library>
void implement_passes(Library& m) {
  m.impl("norm", &boxed<norm<Device>>);
  m.impl("norm_backward", &boxed<norm_backward<Device>>);
  m.impl("dropout_add", &boxed<dropout_add<Device>>);
  m.impl("bias_activation", &boxed<bias_activation<Device>>);
  m.impl("bias_activation_backward", &boxed<bias_activation_backward<Device>>);
}

}  // namespace

#ifdef BIGKERN_SIMT
STABLE_TORCH_LIBRARY_IMPL(bigkern_simt, CPU, m) { implement_passes<Cuda>(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(bigkern_native, CPU, m) {
  implement_passes<Cpu>(m);
  m.impl("layernorm_ffn", &boxed<layernorm_ffn>);
  m.impl("layernorm_ffn_backward", &boxed<layernorm_ffn_backward>);
  m.impl("frozen_layernorm_ffn", &boxed<frozen_layernorm_ffn>);
  m.impl("pack_ffn_weight", &boxed<pack_ffn_weight>);
}
#ifdef BIGKERN_CUDA
STABLE_TORCH_LIBRARY_IMPL(bigkern_native, CUDA, m) { implement_passes<Cuda>(m); }
#endif
#endif

}  // namespace bigkern::layernorm_ffn
