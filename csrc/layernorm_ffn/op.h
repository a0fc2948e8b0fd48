// What op.cpp is written with: names as enums, checks, optional tensors as pointers. Part of
// op.cpp.
#pragma once

#include "common/op.h"
#include "layernorm_ffn/layernorm_ffn.h"

namespace bigkern::layernorm_ffn {
namespace {

Norm norm_of(const std::string& kind) {
  if (kind == "layer") return Norm::layer;
  require(kind == "rms", "kind must be layer or rms, not ", kind);
  return Norm::rms;
}

Activation activation_of(const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  if (name == "swiglu") return Activation::swiglu;
  require(name == "geglu", "activation must be relu, gelu, gelu_tanh, silu, swiglu or geglu, not ",
          name);
  return Activation::geglu;
}

std::vector<int64_t> sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

// [..., N] is M rows of N.
struct Rows {
  int64_t M, N;
};

Rows rows_of(const Tensor& x, const char* name) {
  require(x.dim() >= 1 && x.size(x.dim() - 1) > 0, name, " must be [..., N] with N > 0");
  const int64_t N = x.size(x.dim() - 1);
  return {x.numel() / N, N};
}

OptionalTensor empty_if(bool wanted, const Tensor& like, const std::vector<int64_t>& sizes) {
  return wanted ? OptionalTensor(empty(like, sizes)) : std::nullopt;
}
OptionalTensor empty_f32_if(bool wanted, const Tensor& like, int64_t M) {
  return wanted ? OptionalTensor(empty_f32(like, {M})) : std::nullopt;
}

float* out_f32(const OptionalTensor& x) { return static_cast<float*>(out(x)); }
const float* in_f32(const OptionalTensor& x) { return static_cast<const float*>(data_or_null(x)); }

#ifndef BIGKERN_SIMT  // the whole block: the CPU backend
struct Form {
  Arguments& in;
  std::string norm = in.text(), activation = in.text(), placement = in.text();
  bool residual = in.flag();
  double eps = in.real();
};

Norm norm_or_none_of(const std::string& norm) {
  return norm == "none" ? Norm::none : norm_of(norm);
}

Placement placement_of(const std::string& name) {
  if (name == "pre") return Placement::pre;
  require(name == "post", "placement must be pre or post, not ", name);
  return Placement::post;
}

// [F or 2F, D] and [D, F]: the sizes that both directions need.
struct Sizes {
  int64_t M, D, F, rows;  // rows of w1

  Sizes(const Tensor& x, const Tensor& w1, const Tensor& w2, Activation activation) {
    const Rows of_x = rows_of(x, "x");
    require(of_x.M > 0, "x must have at least one row");
    require(w1.dim() == 2 && w2.dim() == 2, "w1 and w2 must be matrices");
    M = of_x.M, D = of_x.N, F = w2.size(1), rows = is_gated(activation) ? 2 * F : F;
    require(F > 0 && w1.size(0) == rows && w1.size(1) == D && w2.size(0) == D,
            "w1 must be [F, D] ([2F, D] gated) and w2 [D, F]");
  }
};

// A weight as it lies, or a copy: in rows, or, where it may, transposed, as GPT-2's are.
struct Lying {
  bool transposed;
  Tensor weight;

  Lying(const Tensor& w, bool may_be_transposed)
      : transposed(may_be_transposed && !w.is_contiguous() && w.stride(0) == 1 &&
                   w.stride(1) == w.size(0)),
        weight(transposed ? w : dense(w)) {}

  const void* data() const { return weight.const_data_ptr(); }
  // Its gradient lies as it does.
  OptionalTensor gradient_if(bool wanted) const {
    if (!wanted) return std::nullopt;
    const int64_t rows = weight.size(0), columns = weight.size(1);
    if (!transposed) return empty(weight, {rows, columns});
    return torch::stable::transpose(empty(weight, {columns, rows}), 0, 1);
  }
};

// The fp32 matrix that a weight's gradient is added to.
float* sum_of(const OptionalTensor& x, const char* name, const First& first, Dims sizes) {
  check_f32(x, name, first, sizes);
  require(!x.has_value() || x->is_contiguous(), name, " must be contiguous");
  return out_f32(x);
}
#endif

}  // namespace
}  // namespace bigkern::layernorm_ffn
