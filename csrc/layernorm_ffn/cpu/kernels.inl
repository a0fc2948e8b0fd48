// All CPU kernels of the op, compiled by dispatch.cpp once per instruction set; no include guard.

// clang-format off: each builds on those before it
#include "common/cpu/dropout.inl"
#include "common/cpu/gemm.inl"

namespace bigkern::layernorm_ffn::BIGKERN_ISA {
using namespace bigkern::BIGKERN_ISA;
}

#include "layernorm_ffn/cpu/dropout.inl"
#include "layernorm_ffn/cpu/norm.inl"
#include "layernorm_ffn/cpu/activation.inl"
#include "layernorm_ffn/cpu/ffn_weights.inl"
#include "layernorm_ffn/cpu/ffn_forward.inl"
#include "layernorm_ffn/cpu/ffn_backward.inl"
#include "layernorm_ffn/cpu/launch.inl"
// clang-format on
