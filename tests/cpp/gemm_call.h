// What test_gemm.cpp asks of the kernels in gemm_kernels.inl.
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace bigkern::gemm_test {

struct Call {
  Dtype dtype;
  int64_t M, N, K;
  const void* A;
  int64_t a_row, a_column;
  const void* B;
  int64_t b_row, b_column;
  float* C;  // [M, N]
  bool accumulate;
  float* workspace;
};

enum class Function { exp, exp2, log, tanh, normal_cdf, sqrt, sum, greatest };

}  // namespace bigkern::gemm_test
