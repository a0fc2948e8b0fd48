// The second half of every gradient that is a sum over rows.
//
// The big kernels leave partial sums, one row of fp32 for each of P slices of the rows; this one
// adds them up. In a fixed order: the result does not change from run to run.
//
//   partials [P, 2, N] fp32  ->  first [N], second [N]         or  [P, 1, N]  ->  first [N]
#pragma once

#include "layernorm_ffn/cuda/table.cuh"

namespace bigkern::layernorm_ffn::cuda {

struct ColumnSumParams {
  const float* partials;
  int64_t P, N;
  int outputs;   // 1 or 2
  void* first;   // null ok: not wanted
  void* second;  // null ok: not wanted
};

int column_sum(const ColumnSumParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace bigkern::layernorm_ffn::cuda
