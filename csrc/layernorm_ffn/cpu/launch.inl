// What one instruction set offers to dispatch.cpp: each launcher on the call's dtype.
//
// Compiled once per instruction set.

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "layernorm_ffn/cpu/ffn_backward.inl"
#endif

namespace bigkern::layernorm_ffn::BIGKERN_ISA {

void norm_forward(const NormParams& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto t) BIGKERN_FN { norm_forward<decltype(t)>(p, parallel); });
}

void norm_backward(const NormBackwardParams& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto t) BIGKERN_FN { norm_backward<decltype(t)>(p, parallel); });
}

void bias_activation(const BiasActivationParams& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto t) BIGKERN_FN { bias_activation<decltype(t)>(p, parallel); });
}

void bias_activation_backward(const BiasActivationBackwardParams& p, const Parallel& parallel) {
  with_dtype(p.dtype,
             [&](auto t) BIGKERN_FN { bias_activation_backward<decltype(t)>(p, parallel); });
}

void dropout_add(const DropoutAddParams& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto t) BIGKERN_FN { dropout_add<decltype(t)>(p, parallel); });
}

void ffn_forward(const FfnParams& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto t) BIGKERN_FN { ffn_forward<decltype(t)>(p, parallel); });
}

void ffn_backward(const FfnBackwardParams& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto t) BIGKERN_FN { ffn_backward<decltype(t)>(p, parallel); });
}

void pack_weight(const PackWeightParams& p, const Parallel& parallel) {
  if (p.dtype == WeightDtype::i8) return pack_weight<int8_t>(p, parallel);
  const auto dtype = static_cast<Dtype>(static_cast<int>(p.dtype));
  with_dtype(dtype, [&](auto t) BIGKERN_FN { pack_weight<decltype(t)>(p, parallel); });
}

size_t packed_elements(const PackWeightParams& p, int) {
  const int64_t N = product_columns(p.rows, p.gated);
  return size_t((N + NR - 1) / NR * panel_elements(p.columns));
}

size_t norm_backward_workspace(const NormBackwardParams& p, int) {
  return size_t(row_sum_blocks(p.M) * 2 * p.N) * sizeof(float);
}

size_t bias_activation_backward_workspace(const BiasActivationBackwardParams& p, int) {
  const int64_t width = is_gated(p.activation) ? 2 * p.F : p.F;
  return size_t(row_sum_blocks(p.M) * width) * sizeof(float);
}

size_t ffn_forward_workspace(const FfnParams& p, int threads) {
  return with_dtype(p.dtype, [&](auto t) BIGKERN_FN {
    return FfnForward<decltype(t)>(p, threads).total * sizeof(float);
  });
}

size_t ffn_backward_workspace(const FfnBackwardParams& p, int threads) {
  return with_dtype(p.dtype, [&](auto t) BIGKERN_FN {
    return FfnBackward<decltype(t)>(p, threads).total * sizeof(float);
  });
}

}  // namespace bigkern::layernorm_ffn::BIGKERN_ISA
