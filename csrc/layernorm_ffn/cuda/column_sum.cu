// Adds up the partial sums of gradients over rows: see column_sum.cuh.
//
// A block is 32 columns by 32 slices: a warp reads 32 neighbouring columns, the 32 warps walk
// through the slices together, and the first warp adds up what they found.
#include "layernorm_ffn/cuda/column_sum.cuh"
#include "layernorm_ffn/cuda/kernels.h"

namespace bigkern::layernorm_ffn::cuda {
namespace {

constexpr int kColumns = 32;
constexpr int kSlices = 32;

template <class T>
__global__ void __launch_bounds__(kColumns* kSlices) column_sum_kernel(ColumnSumParams p) {
  __shared__ float sums[kSlices][kColumns];
  T* const out = static_cast<T*>(blockIdx.y == 0 ? p.first : p.second);
  if (out == nullptr) return;
  const int lane = int(threadIdx.x) % kColumns, slice = int(threadIdx.x) / kColumns;
  const int64_t column = int64_t(blockIdx.x) * kColumns + lane;
  const float* partials = p.partials + blockIdx.y * p.N + column;

  float sum = 0.0f;
  if (column < p.N) {
#pragma unroll 8
    for (int64_t k = slice; k < p.P; k += kSlices) sum += partials[k * p.outputs * p.N];
  }
  sums[slice][lane] = sum;
  __syncthreads();
  if (slice != 0 || column >= p.N) return;
#pragma unroll
  for (int k = 1; k < kSlices; ++k) sum += sums[k][lane];
  out[column] = from_float<T>(sum);
}

using Function = void (*)(ColumnSumParams);

template <class T>
constexpr Kernel<Function> column_sum_of(const char* name) {
  return {name, DtypeOf<T>::value, INT64_MAX, false, kColumns * kSlices, 1, column_sum_kernel<T>};
}

const Kernel<Function> kTable[] = {
    column_sum_of<bf16>("column_sum bf16"),
    column_sum_of<fp16>("column_sum fp16"),
    column_sum_of<float>("column_sum fp32"),
};

}  // namespace

int column_sum(const ColumnSumParams& p, Dtype dtype, cudaStream_t stream) {
  const auto* kernel = find(kTable, dtype, p.N, false);
  const dim3 grid(unsigned((p.N + kColumns - 1) / kColumns), unsigned(p.outputs));
  return launch(kernel->function, grid, dim3(kernel->threads), 0, stream, p);
}

int column_sum_kernels(KernelInfo* out, int capacity) { return list(kTable, out, capacity); }

int kernels(KernelInfo* out, int capacity) {
  int count = norm_forward_kernels(out, capacity);
  count += norm_backward_kernels(out + count, capacity - count);
  count += bias_activation_kernels(out + count, capacity - count);
  count += dropout_add_kernels(out + count, capacity - count);
  return count + column_sum_kernels(out + count, capacity - count);
}

}  // namespace bigkern::layernorm_ffn::cuda
