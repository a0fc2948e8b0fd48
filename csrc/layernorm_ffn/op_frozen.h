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

// The weight as one row of panels, in its dtype: what frozen_layernorm_ffn takes as w1_packed
// (gated as the activation is) and w2_packed (not gated).
Tensor pack_ffn_weight(const Tensor& weight_, bool gated) {
  PackWeightParams p = packing_of(weight_, "weight", gated);
  check_storage(weight_, "weight");
  const Tensor weight = dense(weight_);
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

Tensor frozen_layernorm_ffn(const Tensor& x_, const Tensor& w1_, const OptionalTensor& w1_scale,
                            const OptionalTensor& b1_, const Tensor& w2_,
                            const OptionalTensor& w2_scale, const OptionalTensor& b2_,
                            const OptionalTensor& norm_weight_, const OptionalTensor& norm_bias_,
                            const OptionalTensor& w1_packed, const OptionalTensor& w2_packed,
                            const std::string& kind, const std::string& activation_name,
                            const std::string& placement_name, bool residual, double eps) {
  const Activation activation = activation_of(activation_name);
  const First first(x_, "x");
  const Sizes of(x_, w1_, w2_, activation);
  check(b1_, "b1", first, {of.rows});
  check(b2_, "b2", first, {of.D});
  check(norm_weight_, "norm_weight", first, {of.D});
  check(norm_bias_, "norm_bias", first, {of.D});
  const FrozenWeight w1(w1_, w1_scale, w1_packed, first, is_gated(activation), "w1");
  const FrozenWeight w2(w2_, w2_scale, w2_packed, first, false, "w2");

  const Tensor x = dense(x_);
  const OptionalTensor b1 = dense(b1_), b2 = dense(b2_);
  const OptionalTensor norm_weight = dense(norm_weight_), norm_bias = dense(norm_bias_);
  Tensor y = empty(x, sizes_of(x));
  FfnParams p = {};
  p.dtype = first.dtype, p.M = of.M, p.D = of.D, p.F = of.F;
  p.norm = norm_or_none_of(kind), p.activation = activation;
  p.placement = placement_of(placement_name), p.residual = residual;
  p.eps = static_cast<float>(eps);
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
