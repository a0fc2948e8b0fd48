// The CUDA kernels of recurrent, listed.
#pragma once

#include "common/kernel_info.h"

namespace bigkern::recurrent::cuda {

// Fills at most `capacity` entries and returns how many kernels there are.
int kernels(KernelInfo* out, int capacity);

int scan_kernels(KernelInfo* out, int capacity);
int scan_backward_kernels(KernelInfo* out, int capacity);

}  // namespace bigkern::recurrent::cuda
