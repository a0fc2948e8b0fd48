// All CPU kernels of the op, compiled by cpu.cpp once per instruction set; no include guard.

// clang-format off: each builds on those before it
#include "common/cpu/dropout.h"
#include "common/cpu/gemm.h"

namespace bigkern::layernorm_ffn::BIGKERN_ISA {
using namespace bigkern::BIGKERN_ISA;
}

#include "layernorm_ffn/cpu_dropout.h"
#include "layernorm_ffn/cpu_norm.h"
#include "layernorm_ffn/cpu_activation.h"
#include "layernorm_ffn/cpu_ffn_weights.h"
#include "layernorm_ffn/cpu_ffn_forward.h"
#include "layernorm_ffn/cpu_ffn_backward.h"
#include "layernorm_ffn/cpu_launch.h"
// clang-format on
