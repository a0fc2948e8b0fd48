// Launching the Adam update: fill a table, launch, advance the steps; again while parameters are
// left.
#include "adam/adam.h"
#include "adam/cuda/kernels.h"
#include "adam/cuda/update.cuh"
#include "adam/cuda/update_codes.cuh"
#include "common/cuda/launch.cuh"

namespace bigkern::adam::cuda {
namespace {

using UpdateKernel = void(const Table);

struct Instance {
  const char* name;
  UpdateKernel* kernel;  // null: no such update
};

constexpr Instance kNone = {nullptr, nullptr};

// Indexed by Dtype, Moments and amsgrad.
constexpr Instance kUpdates[3][4][2] = {
    {{{"update<float>", update_kernel<float, float, false>},
      {"update<float, amsgrad>", update_kernel<float, float, true>}},
     {{"update<float, moments bf16>", update_kernel<float, bf16, false>},
      {"update<float, moments bf16, amsgrad>", update_kernel<float, bf16, true>}},
     {kNone, kNone},
     {{"update_codes<float>", update_codes_kernel<float>}, kNone}},
    {{{"update<bf16, moments float>", update_kernel<bf16, float, false>},
      {"update<bf16, moments float, amsgrad>", update_kernel<bf16, float, true>}},
     {{"update<bf16>", update_kernel<bf16, bf16, false>},
      {"update<bf16, amsgrad>", update_kernel<bf16, bf16, true>}},
     {kNone, kNone},
     {{"update_codes<bf16>", update_codes_kernel<bf16>}, kNone}},
    {{{"update<fp16, moments float>", update_kernel<fp16, float, false>},
      {"update<fp16, moments float, amsgrad>", update_kernel<fp16, float, true>}},
     {{"update<fp16, moments bf16>", update_kernel<fp16, bf16, false>},
      {"update<fp16, moments bf16, amsgrad>", update_kernel<fp16, bf16, true>}},
     {{"update<fp16>", update_kernel<fp16, fp16, false>},
      {"update<fp16, amsgrad>", update_kernel<fp16, fp16, true>}},
     {{"update_codes<fp16>", update_codes_kernel<fp16>}, kNone}},
};

Table table_of(const Update& call) {
  Table table;
  table.constants = constants_of(call);
  table.grad_scale = call.grad_scale;
  table.found_inf = call.found_inf;
  table.lr_tensor = call.lr_tensor;
  table.grad_norm = call.grad_norm;
  table.seed = call.seed;
  table.max_norm = float(call.max_norm);
  table.master = call.master;
  table.zero_grads = call.zero_grads;
  table.stochastic = call.stochastic;
  return table;
}

}  // namespace

int update(const Update& call, const Parameter* parameters, int64_t count, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  UpdateKernel* const kernel = kUpdates[int(call.dtype)][int(call.moments)][call.amsgrad].kernel;
  if (kernel == nullptr) return cudaErrorInvalidValue;
  const int chunk = call.moments == Moments::codes ? kCodesChunk : kChunk;
  Table table = table_of(call);
  while (count > 0) {
    const int64_t taken = fill(table.chunks, parameters, count, chunk);
    if (taken == 0) return cudaErrorInvalidValue;
    const int chunks = table.chunks.total();
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
  for (const auto& by_moments : kUpdates) {
    for (const auto& by_amsgrad : by_moments) {
      for (const Instance& instance : by_amsgrad) {
        if (instance.kernel != nullptr && count < capacity)
          out[count++] = kernel_info(instance.name, instance.kernel, 0);
      }
    }
  }
  if (count < capacity) out[count++] = kernel_info("advance", advance_kernel, 0);
  return count + grad_norm_kernels(out + count, capacity - count);
}

}  // namespace bigkern::adam::cuda
