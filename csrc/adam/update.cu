// Launching the Adam update: fill a table, launch, advance the steps; again while parameters are
// left.
#include "adam/adam.h"
#include "adam/kernels.h"
#include "adam/update.cuh"
#include "common/launch.cuh"

namespace bigkern::adam::cuda {
namespace {

using UpdateKernel = void(const Table);

struct Instance {
  const char* name;
  UpdateKernel* kernel;
};

// Indexed by Dtype and amsgrad.
constexpr Instance kUpdates[3][2] = {
    {{"update<float>", update_kernel<float, false>},
     {"update<float, amsgrad>", update_kernel<float, true>}},
    {{"update<bf16>", update_kernel<bf16, false>},
     {"update<bf16, amsgrad>", update_kernel<bf16, true>}},
    {{"update<fp16>", update_kernel<fp16, false>},
     {"update<fp16, amsgrad>", update_kernel<fp16, true>}},
};

// A grid has at most 2^31 - 1 blocks. A parameter beyond them, 8 T elements, fits no GPU.
constexpr int64_t kMaxChunks = (int64_t(1) << 31) - 1;

int64_t chunks_of(const Parameter& x) { return (x.n + kChunk - 1) / kChunk; }

// Takes as many parameters as fit; returns how many.
int64_t fill(Table& table, const Parameter* parameters, int64_t count) {
  int64_t chunks = 0;
  int taken = 0;
  while (taken < count && taken < kCapacity &&
         chunks + chunks_of(parameters[taken]) <= kMaxChunks) {
    table.parameters[taken] = parameters[taken];
    table.first_chunk[taken] = int(chunks);
    chunks += chunks_of(parameters[taken]);
    ++taken;
  }
  table.count = taken;
  table.first_chunk[taken] = int(chunks);
  return taken;
}

}  // namespace

int update(const Update& call, const Parameter* parameters, int64_t count, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  UpdateKernel* const kernel = kUpdates[int(call.dtype)][call.amsgrad].kernel;
  Table table;
  table.constants = constants_of(call);
  table.grad_scale = call.grad_scale;
  table.found_inf = call.found_inf;
  table.lr_tensor = call.lr_tensor;
  while (count > 0) {
    const int64_t taken = fill(table, parameters, count);
    if (taken == 0) return cudaErrorInvalidValue;
    const int chunks = table.first_chunk[taken];
    if (chunks > 0) {
      const cudaError_t error =
          launch(kernel, dim3(unsigned(chunks)), dim3(kThreads), 0, stream, table);
      if (error != cudaSuccess) return error;
    }
    const cudaError_t error = launch(advance_kernel, dim3(1), dim3(kThreads), 0, stream, table);
    if (error != cudaSuccess) return error;
    parameters += taken;
    count -= taken;
  }
  return cudaSuccess;
}

int kernels(KernelInfo* out, int capacity) {
  int count = 0;
  for (const auto& by_dtype : kUpdates) {
    for (const Instance& instance : by_dtype) {
      if (count < capacity) out[count++] = kernel_info(instance.name, instance.kernel, 0);
    }
  }
  if (count < capacity) out[count++] = kernel_info("advance", advance_kernel, 0);
  return count;
}

}  // namespace bigkern::adam::cuda
