// The Euclidean norm of all gradients, the same bits in every run:
//
//   chunk = block    |0 |1 |2 |3 |4 |5 |6 |    sum of squares, fp32: 4 or 8 partial sums a thread,
//                     |  |  |  |  |  |  |      then a tree of threads
//   workspace        [s0 s1 s2 s3 s4 s5 s6]    one float a chunk
//                     \__\__\__|__/__/__/      one block, double, in a fixed order
//   norm                   sqrt
//
// Reads each gradient once: 2 bytes an element in bf16. An infinity or a NaN anywhere comes out.
#pragma once

#include "adam/cuda/chunks.cuh"
#include "adam/cuda/storage.cuh"
#include "common/cuda/cuda.cuh"
#include "common/cuda/reduce.cuh"

namespace bigkern::adam::cuda {

constexpr int kNormThreads = 256;
constexpr int kNormChunk = 16384;  // elements
constexpr int kSumThreads = 1024;

struct NormTable {
  float* sums;  // of this table's chunks
  Chunks chunks;
};
static_assert(sizeof(NormTable) <= kLargestArgument, "a kernel's parameters are limited");

template <class T, int N>
__device__ __forceinline__ void add_squares(const void* g, int64_t i, float (&sums)[N]) {
  float x[N];
  load<T>(g, i, x);
#pragma unroll
  for (int k = 0; k < N; ++k) sums[k] = fmaf(x[k], x[k], sums[k]);
}

template <class T>
__global__ __launch_bounds__(kNormThreads) void squares_kernel(
    const __grid_constant__ NormTable table) {
  constexpr int N = kVecWidth<T>;
  __shared__ float scratch[kNormThreads / kWarpSize];
  const Share share = share_of<kNormChunk>(table.chunks, int(blockIdx.x));
  const void* g = table.chunks.parameters[share.parameter].g;
  const bool aligned = reinterpret_cast<uintptr_t>(g) % 16 == 0;
  const int64_t whole = share.begin + (aligned ? (share.end - share.begin) / N * N : 0);
  float sums[N] = {}, rest[1] = {};
#pragma unroll 4
  for (int64_t i = share.begin + int(threadIdx.x) * N; i < whole; i += kNormThreads * N) {
    add_squares<T>(g, i, sums);
  }
  for (int64_t i = whole + int(threadIdx.x); i < share.end; i += kNormThreads) {
    add_squares<T>(g, i, rest);
  }
#pragma unroll
  for (int k = 0; k < N; ++k) rest[0] += sums[k];
  const float sum = block_sum<kNormThreads>(rest[0], scratch);
  if (threadIdx.x == 0) table.sums[blockIdx.x] = sum;
}

// norm = sqrt(sums[0] + .. + sums[count - 1]), by one block.
__global__ __launch_bounds__(kSumThreads) void norm_kernel(const float* sums, int64_t count,
                                                           float* norm) {
  __shared__ double partial[kSumThreads];
  const int thread = int(threadIdx.x);
  double sum = 0.0;
  for (int64_t i = thread; i < count; i += kSumThreads) sum += double(sums[i]);
  partial[thread] = sum;
  for (int width = kSumThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (thread < width) partial[thread] += partial[thread + width];
  }
  if (thread == 0) *norm = float(sqrt(partial[0]));
}

}  // namespace bigkern::adam::cuda
