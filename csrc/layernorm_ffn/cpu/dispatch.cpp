// The op on the CPU: picks the kernels of the machine's instruction set.
//
// The kernels are written once, in *.inl, and compiled here for every level (foreach_isa.h).

#include "layernorm_ffn/layernorm_ffn.h"

#define BIGKERN_KERNELS "layernorm_ffn/cpu/kernels.inl"
#include "common/cpu/foreach_isa.h"

namespace bigkern::layernorm_ffn::cpu {
namespace {

template <class Result, class Params, class Extra>
using PerIsa = Result (*const[isa_count])(const Params&, Extra);

constexpr PerIsa<void, NormParams, const Parallel&> norm_forwards = BIGKERN_PER_ISA(norm_forward);
constexpr PerIsa<void, NormBackwardParams, const Parallel&> norm_backwards =
    BIGKERN_PER_ISA(norm_backward);
constexpr PerIsa<void, BiasActivationParams, const Parallel&> bias_activations =
    BIGKERN_PER_ISA(bias_activation);
constexpr PerIsa<void, BiasActivationBackwardParams, const Parallel&> bias_activation_backwards =
    BIGKERN_PER_ISA(bias_activation_backward);
constexpr PerIsa<void, DropoutAddParams, const Parallel&> dropout_adds =
    BIGKERN_PER_ISA(dropout_add);
constexpr PerIsa<void, FfnParams, const Parallel&> ffn_forwards = BIGKERN_PER_ISA(ffn_forward);
constexpr PerIsa<void, FfnBackwardParams, const Parallel&> ffn_backwards =
    BIGKERN_PER_ISA(ffn_backward);
constexpr PerIsa<void, PackWeightParams, const Parallel&> pack_weights =
    BIGKERN_PER_ISA(pack_weight);
constexpr PerIsa<size_t, PackWeightParams, int> all_packed_elements =
    BIGKERN_PER_ISA(packed_elements);
constexpr PerIsa<size_t, NormBackwardParams, int> norm_backward_workspaces =
    BIGKERN_PER_ISA(norm_backward_workspace);
constexpr PerIsa<size_t, BiasActivationBackwardParams, int> bias_activation_backward_workspaces =
    BIGKERN_PER_ISA(bias_activation_backward_workspace);
constexpr PerIsa<size_t, FfnParams, int> ffn_forward_workspaces =
    BIGKERN_PER_ISA(ffn_forward_workspace);
constexpr PerIsa<size_t, FfnBackwardParams, int> ffn_backward_workspaces =
    BIGKERN_PER_ISA(ffn_backward_workspace);

int level() { return static_cast<int>(isa()); }

}  // namespace

size_t packed_elements(const PackWeightParams& params) {
  return all_packed_elements[level()](params, 0);
}
size_t norm_backward_workspace(const NormBackwardParams& params, int threads) {
  return norm_backward_workspaces[level()](params, threads);
}
size_t bias_activation_backward_workspace(const BiasActivationBackwardParams& params, int threads) {
  return bias_activation_backward_workspaces[level()](params, threads);
}
size_t ffn_forward_workspace(const FfnParams& params, int threads) {
  return ffn_forward_workspaces[level()](params, threads);
}
size_t ffn_backward_workspace(const FfnBackwardParams& params, int threads) {
  return ffn_backward_workspaces[level()](params, threads);
}
void norm_forward(const NormParams& params, const Parallel& parallel) {
  norm_forwards[level()](params, parallel);
}
void norm_backward(const NormBackwardParams& params, const Parallel& parallel) {
  norm_backwards[level()](params, parallel);
}
void bias_activation(const BiasActivationParams& params, const Parallel& parallel) {
  bias_activations[level()](params, parallel);
}
void bias_activation_backward(const BiasActivationBackwardParams& params,
                              const Parallel& parallel) {
  bias_activation_backwards[level()](params, parallel);
}
void dropout_add(const DropoutAddParams& params, const Parallel& parallel) {
  dropout_adds[level()](params, parallel);
}
void ffn_forward(const FfnParams& params, const Parallel& parallel) {
  ffn_forwards[level()](params, parallel);
}
void ffn_backward(const FfnBackwardParams& params, const Parallel& parallel) {
  ffn_backwards[level()](params, parallel);
}
void pack_weight(const PackWeightParams& params, const Parallel& parallel) {
  pack_weights[level()](params, parallel);
}

}  // namespace bigkern::layernorm_ffn::cpu
