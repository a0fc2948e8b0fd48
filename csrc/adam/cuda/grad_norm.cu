// Launching the norm of all gradients: squares summed table after table, then the sums.
#include "adam/adam.h"
#include "adam/cuda/grad_norm.cuh"
#include "adam/cuda/kernels.h"
#include "common/cuda/launch.cuh"

namespace bigkern::adam::cuda {
namespace {

using SquaresKernel = void(const NormTable);

struct Instance {
  const char* name;
  SquaresKernel* kernel;
};

// Indexed by Dtype.
constexpr Instance kSquares[3] = {{"squares<float>", squares_kernel<float>},
                                  {"squares<bf16>", squares_kernel<bf16>},
                                  {"squares<fp16>", squares_kernel<fp16>}};

}  // namespace

int64_t grad_norm_workspace(const Parameter* parameters, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += chunks_of(parameters[i], kNormChunk);
  return chunks;
}

int grad_norm(Dtype dtype, const Parameter* parameters, int64_t count, float* workspace,
              float* norm, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  SquaresKernel* const kernel = kSquares[int(dtype)].kernel;
  NormTable table;
  table.sums = workspace;
  while (count > 0) {
    const int64_t taken = fill(table.chunks, parameters, count, kNormChunk);
    if (taken == 0) return cudaErrorInvalidValue;
    const int chunks = table.chunks.total();
    if (chunks > 0) {
      const cudaError_t error =
          launch(kernel, dim3(unsigned(chunks)), dim3(kNormThreads), 0, stream, table);
      if (error != cudaSuccess) return error;
    }
    table.sums += chunks;
    parameters += taken;
    count -= taken;
  }
  return launch(norm_kernel, dim3(1), dim3(kSumThreads), 0, stream, workspace,
                int64_t(table.sums - workspace), norm);
}

int grad_norm_kernels(KernelInfo* out, int capacity) {
  int count = 0;
  for (const Instance& instance : kSquares) {
    if (count < capacity) out[count++] = kernel_info(instance.name, instance.kernel, 0);
  }
  if (count < capacity) out[count++] = kernel_info("norm", norm_kernel, 0);
  return count;
}

}  // namespace bigkern::adam::cuda
