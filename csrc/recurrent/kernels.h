// The recurrent room's CUDA kernels, listed.
#pragma once

#include "common/kernel_info.h"
#include "recurrent/recurrent.h"

namespace bigkern::recurrent::cuda {

// Fills at most `capacity` entries and returns how many kernels there are.
int kernels(KernelInfo* out, int capacity);

int scan_kernels(KernelInfo* out, int capacity);
int scan_backward_kernels(KernelInfo* out, int capacity);

// Whether the current device holds the recurrent weights on chip, for the scan and its backward;
// both launchers fail where it does not.
bool fits(const Sizes& of);

}  // namespace bigkern::recurrent::cuda
