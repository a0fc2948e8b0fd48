// The attention op's CUDA kernels, listed; and the parts that its launchers are made of.
#pragma once

#include "attention/attention.h"
#include "common/kernel_info.h"

namespace bigkern::attention::cuda {

// Fills at most `capacity` entries and returns how many kernels there are.
int kernels(KernelInfo* out, int capacity);

int forward_kernels(KernelInfo* out, int capacity);
int dq_kernels(KernelInfo* out, int capacity);
int dkdv_kernels(KernelInfo* out, int capacity);
int dbias_kernels(KernelInfo* out, int capacity);
int decode_kernels(KernelInfo* out, int capacity);

// What the passes of the backward read besides the call: for each query, lse times kUnit, +inf
// where there is nothing to attend to, and delta = rowsum(do * o) - dlse. A sequence's rows are
// padded to a multiple of kQueryPad with +inf and 0, so that nothing comes of a query past the end.
constexpr int64_t kQueryPad = 64;

int launch_dq(const Backward& call, void* stream);
int launch_dkdv(const Backward& call, void* stream);
int launch_dbias(const Backward& call, void* stream);

}  // namespace bigkern::attention::cuda
