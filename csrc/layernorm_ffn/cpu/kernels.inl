// The CPU kernels, in the order in which they build on each other. Compiled once per instruction
// set.

// clang-format off
#include "common/cpu/dropout.inl"
#include "common/cpu/gemm.inl"

#include "layernorm_ffn/cpu/dropout.inl"
#include "layernorm_ffn/cpu/norm.inl"
#include "layernorm_ffn/cpu/activation.inl"
#include "layernorm_ffn/cpu/passes.inl"
#include "layernorm_ffn/cpu/ffn_weights.inl"
#include "layernorm_ffn/cpu/ffn_forward.inl"
#include "layernorm_ffn/cpu/ffn_backward.inl"
#include "layernorm_ffn/cpu/launch.inl"
// clang-format on
