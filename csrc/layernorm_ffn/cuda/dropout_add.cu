// out = drop(x) (+ residual): around an FFN's second product, and for its backward, where the same
// elements are dropped from the gradient. What is dropped is drawn again, never stored.
#include "layernorm_ffn/cuda/elementwise.cuh"
#include "layernorm_ffn/cuda/kernels.h"

namespace bigkern::layernorm_ffn::cuda {
namespace {

template <class T, int WIDTH>
__global__ void __launch_bounds__(kElementThreads) dropout_add_kernel(DropoutAddParams p) {
  const int64_t column = own_column<WIDTH>();
  if (column >= p.N) return;
  for (int64_t m = blockIdx.y; m < p.M; m += gridDim.y) {
    const int64_t at = m * p.N + column;
    float values[WIDTH];
    load_vec(static_cast<const T*>(p.x) + at, values);
    RowDropout(p.dropout, kOutput, m).apply(values, column);
    if (p.residual != nullptr) {
      float residual[WIDTH];
      load_vec(static_cast<const T*>(p.residual) + at, residual);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) values[i] += residual[i];
    }
    store_vec(static_cast<T*>(p.out) + at, values);
  }
}

const Kernel<void (*)(DropoutAddParams)> kTable[] = {
    elementwise<bf16, 8>("dropout_add bf16", dropout_add_kernel<bf16, 8>),
    elementwise<bf16, 1>("dropout_add bf16 scalar", dropout_add_kernel<bf16, 1>),
    elementwise<fp16, 8>("dropout_add fp16", dropout_add_kernel<fp16, 8>),
    elementwise<fp16, 1>("dropout_add fp16 scalar", dropout_add_kernel<fp16, 1>),
    elementwise<float, 4>("dropout_add fp32", dropout_add_kernel<float, 4>),
    elementwise<float, 1>("dropout_add fp32 scalar", dropout_add_kernel<float, 1>),
};

}  // namespace

int dropout_add(const DropoutAddParams& p, void* stream) {
  if (p.M == 0) return cudaSuccess;
  const bool aligned = rows_aligned(p.dtype, p.N, p.x, p.residual, p.out);
  const auto* kernel = find(kTable, p.dtype, p.N, aligned);
  return launch(kernel->function, grid_for(*kernel, p.M, p.N), dim3(kElementThreads), 0,
                static_cast<cudaStream_t>(stream), p);
}

int dropout_add_kernels(KernelInfo* out, int capacity) { return list(kTable, out, capacity); }

}  // namespace bigkern::layernorm_ffn::cuda
