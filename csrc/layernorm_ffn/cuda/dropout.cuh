// Dropout of matrices in CUDA: the generator of common/dropout.h along a row.
#pragma once

#include "common/cuda/cuda.cuh"
#include "common/dropout.h"

namespace bigkern::layernorm_ffn::cuda {

// Row m of one of an op's dropouts. Whether there is any is the same for all threads, so that a
// call without it pays for one branch around each vector.
class RowDropout {
 public:
  __device__ __forceinline__ RowDropout(const Dropout& dropout, uint32_t head, int64_t m)
      : dropout_(dropout),
        row_(dropout.active() ? dropout.head(head).row(uint32_t(m)) : DropoutRow{0, 0}) {}

  // values stand in columns column, column + 1, ...
  template <int WIDTH>
  __device__ __forceinline__ void apply(float (&values)[WIDTH], int64_t column) const {
    if (!dropout_.active()) return;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const bool kept = row_.bits(uint32_t(column + i)) >= dropout_.threshold;
      values[i] = kept ? values[i] * dropout_.scale : 0.0f;
    }
  }

 private:
  const Dropout& dropout_;
  DropoutRow row_;
};

}  // namespace bigkern::layernorm_ffn::cuda
