// The table of the adam op's CUDA kernels.
#pragma once

#include "common/kernel_info.h"

namespace bigkern::adam::cuda {

// Each fills at most `capacity` entries and returns how many it filled.
int kernels(KernelInfo* out, int capacity);            // all of this op
int grad_norm_kernels(KernelInfo* out, int capacity);  // those of the gradients' norm among them

}  // namespace bigkern::adam::cuda
