// The CUDA kernels of layernorm_ffn, listed.
#pragma once

#include "common/kernel_info.h"

namespace bigkern::layernorm_ffn::cuda {

// Fills at most `capacity` entries and returns how many kernels there are.
int kernels(KernelInfo* out, int capacity);

int norm_forward_kernels(KernelInfo* out, int capacity);
int norm_backward_kernels(KernelInfo* out, int capacity);
int bias_activation_kernels(KernelInfo* out, int capacity);
int dropout_add_kernels(KernelInfo* out, int capacity);
int column_sum_kernels(KernelInfo* out, int capacity);

}  // namespace bigkern::layernorm_ffn::cuda
