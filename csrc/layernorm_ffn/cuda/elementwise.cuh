// How the kernels without a reduction along rows walk over a matrix [M, N].
//
// A block owns some columns and every gridDim.y-th row of them; a thread keeps its columns (one
// 16-byte vector of them), and with them what depends on columns alone, from row to row:
//
//            block 0    block 1    ...                      grid.x = columns
//   row 0   [vectors]  [vectors]         slice 0            grid.y = slices of the rows
//   row 1   [vectors]  [vectors]         slice 1
//   ...                                  slice 0 again
#pragma once

#include "layernorm_ffn/cuda/dropout.cuh"
#include "layernorm_ffn/cuda/row.cuh"

namespace bigkern::layernorm_ffn::cuda {

constexpr int kElementThreads = 128;
constexpr int kElementBlocksPerSm = 16;

template <int WIDTH>
__device__ __forceinline__ int64_t own_column() {
  return (int64_t(blockIdx.x) * kElementThreads + threadIdx.x) * WIDTH;
}

template <class T, int WIDTH, class Function>
constexpr Kernel<Function> elementwise(const char* name, Function function) {
  return {name, DtypeOf<T>::value, INT64_MAX, WIDTH > 1, kElementThreads, 1, function};
}

// grid.x covers the columns; grid.y makes as many slices of the rows as fill the device.
template <class Function>
dim3 grid_for(const Kernel<Function>& kernel, int64_t M, int64_t N) {
  const int64_t width = kernel.vector ? 16 / bytes_of(kernel.dtype) : 1;
  int multiprocessors = 1;
  multiprocessor_count(&multiprocessors);
  const int64_t columns = (N + kElementThreads * width - 1) / (kElementThreads * width);
  const int64_t slices = (int64_t(multiprocessors) * kElementBlocksPerSm + columns - 1) / columns;
  return dim3(unsigned(columns), unsigned(min(slices, M)));
}

}  // namespace bigkern::layernorm_ffn::cuda
