// Attention, backward: what each query contributes to all of its row, then dk and dv, dq, dbias.
#include "attention/cuda/backward.cuh"

namespace bigkern::attention::cuda {
namespace {

constexpr int kRowsPerBlock = 4;  // one warp each

// delta = rowsum(do * o) - dlse, and lse times kUnit; see kQueryPad for rows that have no such
// thing.
template <class T>
__global__ void __launch_bounds__(kRowsPerBlock* kWarpSize)
    delta_kernel(const __grid_constant__ Backward call) {
  const Shape& shape = call.shape;
  const int64_t padded = padded_queries(shape.Sq);
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + warp();  // padded is a multiple of them
  const int b = int(row / padded / shape.Hq), h = int(row / padded % shape.Hq);
  const int i = int(row % padded);
  const Window window(shape, b);
  if (i >= padded_queries(window.Sq)) return;  // a sequence shorter than the longest

  float delta = 0.0f, lse = -INFINITY;
  if (i < window.Sq) {
    const auto dout = rows_of<const T>(call.dout, b, h, window.q_begin, window.Sq, shape.Dv);
    const auto o = rows_of<const T>(call.o, b, h, window.q_begin, window.Sq, shape.Dv);
    for (int c = lane(); c < shape.Dv; c += kWarpSize) {
      delta += to_float(dout.data[i * dout.stride + c]) * to_float(o.data[i * o.stride + c]);
    }
    delta = warp_sum(delta) - value_of(call.dlse, b, h, window.q_begin + i, 0.0f);
    lse = value_of(call.lse, b, h, window.q_begin + i, -INFINITY);
  }
  if (lane() == 0) {
    const auto statistics = statistics_of<float>(call, window, b, h);
    statistics.lse[i] = lse == -INFINITY ? INFINITY : lse * kUnit<T>;
    statistics.delta[i] = delta;
  }
}

using DeltaKernel = void (*)(Backward);
struct DeltaEntry {
  const char* name;
  DeltaKernel function;
};

const DeltaEntry kTable[] = {
    // in the order of Dtype
    {"attention delta fp32", delta_kernel<float>},
    {"attention delta bf16", delta_kernel<bf16>},
    {"attention delta fp16", delta_kernel<fp16>},
};

int launch_delta(const Backward& call, void* stream) {
  const Shape& shape = call.shape;
  const int64_t blocks = shape.B * shape.Hq * padded_queries(shape.Sq) / kRowsPerBlock;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch(kTable[int(shape.dtype)].function, dim3(unsigned(blocks)),
                dim3(kRowsPerBlock * kWarpSize), 0, static_cast<cudaStream_t>(stream), call);
}

int delta_kernels(KernelInfo* out, int capacity) {
  constexpr int kCount = sizeof kTable / sizeof kTable[0];
  for (int i = 0; i < kCount && i < capacity; ++i) {
    out[i] = kernel_info(kTable[i].name, kTable[i].function, 0);
  }
  return kCount;
}

}  // namespace

size_t backward_workspace(const Shape& shape) {
  return size_t(2 * shape.Hq * statistics_rows(shape)) * sizeof(float);
}

int backward(const Backward& call, void* stream) {
  int error = launch_delta(call, stream);
  if (error == cudaSuccess) error = launch_dkdv(call, stream);
  if (error == cudaSuccess) error = launch_dq(call, stream);
  if (error == cudaSuccess && call.dbias.data != nullptr) error = launch_dbias(call, stream);
  return error;
}

int kernels(KernelInfo* out, int capacity) {
  int (*const tables[])(KernelInfo*, int) = {forward_kernels, delta_kernels, dkdv_kernels,
                                             dq_kernels,      dbias_kernels, decode_kernels};
  int count = 0;
  for (const auto table : tables) {
    count += table(out + count, capacity > count ? capacity - count : 0);
  }
  return count;
}

}  // namespace bigkern::attention::cuda
