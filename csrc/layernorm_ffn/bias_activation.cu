// What stands between the two matrix products of an FFN: bias, activation, and their gradient.
//
//   p = product + bias          out = act(p)          gated: p = [gate | up], out = act(gate) * up
//   dp = dout * act'(p)         dbias = sum over rows of dp
//
// All of it is bound by memory, so each element is read once and written once. A block owns some
// columns and every gridDim.y-th row of them; a thread keeps its columns (one 16-byte vector of
// them, and gated, the vector F further on too) and thereby its bias, or its part of dbias, in
// registers:
//
//            block 0    block 1    ...                      grid.x = columns
//   row 0   [vectors]  [vectors]         slice 0            grid.y = slices of the rows
//   row 1   [vectors]  [vectors]         slice 1
//   ...                                  slice 0 again
//
// The slices' sums of dbias go to partials [slices, F or 2F] fp32, which column_sum.cu adds up.
#include "layernorm_ffn/activation.cuh"
#include "layernorm_ffn/column_sum.cuh"
#include "layernorm_ffn/kernels.h"
#include "layernorm_ffn/row.cuh"

namespace bigkern::layernorm_ffn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerSm = 16;

template <int WIDTH>
__device__ __forceinline__ int64_t own_column() {
  return (int64_t(blockIdx.x) * kThreads + threadIdx.x) * WIDTH;
}

// Adds the thread's bias to its columns of a row, rounds to T and stores the sum if it is wanted.
template <class T, int WIDTH>
__device__ __forceinline__ void preactivate(const T* product, const Vec<T, WIDTH>& bias, T* store,
                                            float (&p)[WIDTH]) {
  load_vec(product, p);
  Vec<T, WIDTH> rounded;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    rounded.data[i] = from_float<T>(p[i] + to_float(bias.data[i]));
    p[i] = to_float(rounded.data[i]);
  }
  if (store != nullptr) store_vec(store, rounded);
}

template <class T, int WIDTH>
__global__ void __launch_bounds__(kThreads) bias_activation_kernel(BiasActivationParams call) {
  const int64_t F = call.F, column = own_column<WIDTH>();
  if (column >= F) return;
  with_activation(call.activation, [&](auto activation) {
    using A = decltype(activation);
    const int64_t pitch = A::kGated ? 2 * F : F;
    const auto bias = load_or<T, WIDTH>(call.bias, column, 0.0f);
    Vec<T, WIDTH> up_bias;
    if constexpr (A::kGated) up_bias = load_or<T, WIDTH>(call.bias, F + column, 0.0f);

    for (int64_t m = blockIdx.y; m < call.M; m += gridDim.y) {
      const T* product = static_cast<const T*>(call.product) + m * pitch + column;
      T* preactivation = static_cast<T*>(call.preactivation);
      if (preactivation != nullptr) preactivation += m * pitch + column;
      float p[WIDTH], out[WIDTH];
      preactivate(product, bias, preactivation, p);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) out[i] = A::act(p[i]);
      if constexpr (A::kGated) {
        if (preactivation != nullptr) preactivation += F;
        preactivate(product + F, up_bias, preactivation, p);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) out[i] *= p[i];
      }
      store_vec(static_cast<T*>(call.out) + m * F + column, out);
    }
  });
}

template <class T, int WIDTH>
__global__ void __launch_bounds__(kThreads)
    bias_activation_backward_kernel(BiasActivationBackwardParams call) {
  const int64_t F = call.F, column = own_column<WIDTH>();
  if (column >= F) return;
  with_activation(call.activation, [&](auto activation) {
    using A = decltype(activation);
    const int64_t pitch = A::kGated ? 2 * F : F;
    float dbias[WIDTH] = {}, dup_bias[WIDTH] = {};

    for (int64_t m = blockIdx.y; m < call.M; m += gridDim.y) {
      const T* preactivation = static_cast<const T*>(call.preactivation) + m * pitch + column;
      T* dpre = static_cast<T*>(call.dpre) + m * pitch + column;
      float dout[WIDTH], p[WIDTH], out[WIDTH], up[WIDTH], dup[WIDTH];
      load_vec(static_cast<const T*>(call.dout) + m * F + column, dout);
      load_vec(preactivation, p);
      if constexpr (A::kGated) load_vec(preactivation + F, up);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        const Value value = A::both(p[i]);
        out[i] = A::kGated ? value.act * up[i] : value.act;
        p[i] = (A::kGated ? dout[i] * up[i] : dout[i]) * value.slope;
        dbias[i] += p[i];
        if constexpr (A::kGated) dup_bias[i] += dup[i] = dout[i] * value.act;
      }
      store_vec(dpre, p);
      if constexpr (A::kGated) store_vec(dpre + F, dup);
      if (call.out != nullptr) store_vec(static_cast<T*>(call.out) + m * F + column, out);
    }

    if (call.dbias == nullptr) return;
    float* partials = static_cast<float*>(call.workspace) + blockIdx.y * pitch + column;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      partials[i] = dbias[i];
      if constexpr (A::kGated) partials[F + i] = dup_bias[i];
    }
  });
}

// ---- launchers ----------------------------------------------------------------------------------

using Forward = void (*)(BiasActivationParams);
using Backward = void (*)(BiasActivationBackwardParams);

template <class T, int WIDTH, class Function>
constexpr Kernel<Function> entry(const char* name, Function function) {
  return {name, DtypeOf<T>::value, INT64_MAX, WIDTH > 1, kThreads, 1, function};
}

const Kernel<Forward> kForward[] = {
    entry<bf16, 8>("bias_activation bf16", bias_activation_kernel<bf16, 8>),
    entry<bf16, 1>("bias_activation bf16 scalar", bias_activation_kernel<bf16, 1>),
    entry<fp16, 8>("bias_activation fp16", bias_activation_kernel<fp16, 8>),
    entry<fp16, 1>("bias_activation fp16 scalar", bias_activation_kernel<fp16, 1>),
    entry<float, 4>("bias_activation fp32", bias_activation_kernel<float, 4>),
    entry<float, 1>("bias_activation fp32 scalar", bias_activation_kernel<float, 1>),
};

const Kernel<Backward> kBackward[] = {
    entry<bf16, 8>("bias_activation_backward bf16", bias_activation_backward_kernel<bf16, 8>),
    entry<bf16, 1>("bias_activation_backward bf16 scalar",
                   bias_activation_backward_kernel<bf16, 1>),
    entry<fp16, 8>("bias_activation_backward fp16", bias_activation_backward_kernel<fp16, 8>),
    entry<fp16, 1>("bias_activation_backward fp16 scalar",
                   bias_activation_backward_kernel<fp16, 1>),
    entry<float, 4>("bias_activation_backward fp32", bias_activation_backward_kernel<float, 4>),
    entry<float, 1>("bias_activation_backward fp32 scalar",
                    bias_activation_backward_kernel<float, 1>),
};

template <class Function>
int width_of(const Kernel<Function>& kernel) {
  return kernel.vector ? int(16 / bytes_of(kernel.dtype)) : 1;
}

// grid.x covers the columns; grid.y makes as many slices of the rows as fill the device.
dim3 grid_for(int64_t M, int64_t F, int width) {
  int multiprocessors = 1;
  multiprocessor_count(&multiprocessors);
  const int64_t columns = (F + kThreads * width - 1) / (kThreads * width);
  const int64_t slices = (int64_t(multiprocessors) * kBlocksPerSm + columns - 1) / columns;
  return dim3(unsigned(columns), unsigned(min(slices, M)));
}

const Kernel<Forward>* kernel_for(const BiasActivationParams& p) {
  const bool aligned = rows_aligned(p.dtype, p.F, p.product, p.bias, p.preactivation, p.out);
  return find(kForward, p.dtype, p.F, aligned);
}

const Kernel<Backward>* kernel_for(const BiasActivationBackwardParams& p) {
  const bool aligned = rows_aligned(p.dtype, p.F, p.dout, p.preactivation, p.dpre, p.out);
  return find(kBackward, p.dtype, p.F, aligned);
}

}  // namespace

int bias_activation(const BiasActivationParams& p, void* stream) {
  if (p.M == 0) return cudaSuccess;
  const auto* kernel = kernel_for(p);
  return launch(kernel->function, grid_for(p.M, p.F, width_of(*kernel)), dim3(kThreads), 0,
                static_cast<cudaStream_t>(stream), p);
}

size_t bias_activation_backward_workspace(const BiasActivationBackwardParams& p) {
  const int64_t slices = p.M == 0 ? 0 : grid_for(p.M, p.F, width_of(*kernel_for(p))).y;
  const int64_t columns = is_gated(p.activation) ? 2 * p.F : p.F;
  return p.dbias == nullptr ? 0 : size_t(slices * columns) * sizeof(float);
}

int bias_activation_backward(const BiasActivationBackwardParams& p, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  int64_t slices = 0;
  if (p.M > 0) {
    const auto* kernel = kernel_for(p);
    const dim3 grid = grid_for(p.M, p.F, width_of(*kernel));
    const int error = launch(kernel->function, grid, dim3(kThreads), 0, stream, p);
    if (error != cudaSuccess) return error;
    slices = grid.y;
  }
  if (p.dbias == nullptr) return cudaSuccess;
  const int64_t columns = is_gated(p.activation) ? 2 * p.F : p.F;
  return column_sum({static_cast<const float*>(p.workspace), slices, columns, 1, p.dbias, nullptr},
                    p.dtype, stream);
}

int bias_activation_kernels(KernelInfo* out, int capacity) {
  const int forward = list(kForward, out, capacity);
  return forward + list(kBackward, out + forward, capacity - forward);
}

}  // namespace bigkern::layernorm_ffn::cuda
