// The table of the adam op's CUDA kernels.
#pragma once

#include "common/kernel_info.h"

namespace bigkern::adam::cuda {

// Fills at most `capacity` entries; returns how many it filled.
int kernels(KernelInfo* out, int capacity);

}  // namespace bigkern::adam::cuda
