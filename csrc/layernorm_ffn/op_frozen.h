// The block on weights that never change: packed once, int8 with a scale for each row, or both.
// Part of op.cpp.
#pragma once

#include "layernorm_ffn/op.h"

#ifndef BIGKERN_SIMT
namespace bigkern::layernorm_ffn {
namespace {

bool is_int8(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::Char; }

WeightDtype stored_dtype_of(const Tensor& weight, const char* name) {
  return is_int8(weight) ? WeightDtype::i8 : weight_dtype_of(dtype_of(weight, name));
}

PackWeightParams packing_of(const Tensor& weight, const char* name, bool gated) {
  require(weight.dim() == 2 && weight.numel() > 0, name, " must be a matrix, not empty");
  require(!gated || weight.size(0) % 2 == 0, name, " must have an even number of rows");
  return {stored_dtype_of(weight, name), weight.size(0), weight.size(1), gated, nullptr, nullptr};
}

struct PackCall {
  Arguments& in;
  Tensor weight = in.tensor();
  bool gated = in.flag();
};

// The weight as one row of panels, in its dtype: what frozen_layernorm_ffn takes as w1_packed
// (gated as the activation is) and w2_packed (not gated).
Tensor pack_ffn_weight(const PackCall& call) {
  PackWeightParams p = packing_of(call.weight, "weight", call.gated);
  check_storage(call.weight, "weight");
  const Tensor weight = dense(call.weight);
  Tensor panels = empty(weight, {static_cast<int64_t>(cpu::packed_elements(p))});
  p.weight = weight.const_data_ptr(), p.panels = out(panels);
  cpu::pack_weight(p, torch_parallel());
  return panels;
}

// One weight of the block as the kernels take it. What is packed is read in its place: only the
// shape and dtype of the weight itself matter then.
struct FrozenWeight {
  OptionalTensor rows, scale;
  const void* panels;

  FrozenWeight(const Tensor& weight, const OptionalTensor& scale_, const OptionalTensor& packed,
               const First& x, bool gated, const std::string& name)
      : panels(data_or_null(packed)) {
    require(is_int8(weight) == scale_.has_value(), name,
            " has a scale if it is int8, and only then");
    require(is_int8(weight) || dtype_of(weight, name.c_str()) == x.dtype, name,
            " must have x's dtype");
    check_f32(scale_, (name + "_scale").c_str(), x, {weight.size(0)});
    scale = dense(scale_);
    if (!packed.has_value()) {
      check_place(weight, name.c_str(), x);
      rows = dense(weight);
      return;
    }
    const size_t expected = cpu::packed_elements(packing_of(weight, name.c_str(), gated));
    require(packed->scalar_type() == weight.scalar_type() && packed->is_contiguous() &&
                packed->numel() == static_cast<int64_t>(expected),
            name, "_packed is not what pack_ffn_weight made of ", name);
    check_place(*packed, (name + "_packed").c_str(), x);
  }
  const void* data() const { return data_or_null(rows); }
  const float* scales() const { return in_f32(scale); }
};

struct FrozenCall {
  Arguments& in;
  Tensor x = in.tensor(), w1 = in.tensor();
  OptionalTensor w1_scale = in.optional(), b1 = in.optional();
  Tensor w2 = in.tensor();
  OptionalTensor w2_scale = in.optional(), b2 = in.optional();
  OptionalTensor norm_weight = in.optional(), norm_bias = in.optional();
  OptionalTensor w1_packed = in.optional(), w2_packed = in.optional();
  Form form{in};
};

Tensor frozen_layernorm_ffn(const FrozenCall& call) {
  const Activation activation = activation_of(call.form.activation);
  const First first(call.x, "x");
  const Sizes of(call.x, call.w1, call.w2, activation);
  check(call.b1, "b1", first, {of.rows});
  check(call.b2, "b2", first, {of.D});
  check(call.norm_weight, "norm_weight", first, {of.D});
  check(call.norm_bias, "norm_bias", first, {of.D});
  const FrozenWeight w1(call.w1, call.w1_scale, call.w1_packed, first, is_gated(activation), "w1");
  const FrozenWeight w2(call.w2, call.w2_scale, call.w2_packed, first, false, "w2");

  const Tensor x = dense(call.x);
  const OptionalTensor b1 = dense(call.b1), b2 = dense(call.b2);
  const OptionalTensor norm_weight = dense(call.norm_weight), norm_bias = dense(call.norm_bias);
  Tensor y = empty(x, sizes_of(x));
  FfnParams p = {};
  p.dtype = first.dtype, p.M = of.M, p.D = of.D, p.F = of.F;
  p.norm = norm_or_none_of(call.form.norm), p.activation = activation;
  p.placement = placement_of(call.form.placement), p.residual = call.form.residual;
  p.eps = static_cast<float>(call.form.eps);
  p.x = x.const_data_ptr(), p.y = out(y);
  p.norm_weight = data_or_null(norm_weight), p.norm_bias = data_or_null(norm_bias);
  p.b1 = data_or_null(b1), p.b2 = data_or_null(b2);
  p.w1 = w1.data(), p.w1_scale = w1.scales(), p.w1_panels = w1.panels;
  p.w2 = w2.data(), p.w2_scale = w2.scales(), p.w2_panels = w2.panels;
  const Parallel parallel = torch_parallel();
  const Tensor workspace = empty_bytes(x, cpu::ffn_forward_workspace(p, parallel.threads));
  p.workspace = out(workspace);
  cpu::ffn_forward(p, parallel);
  return y;
}

}  // namespace
}  // namespace bigkern::layernorm_ffn
#endif
