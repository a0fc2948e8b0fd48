// What stands between the two matrix products of an FFN: bias, activation, and their gradient.
//
//   p = product + bias      out = drop(act(p))      gated: p = [gate | up], act(gate) * up
//   dp = drop(dout) act'(p)         dbias = sum over rows of dp
//
// All of it is bound by memory, so each element is read once and written once. A thread keeps its
// columns (elementwise.cuh; gated, the vector F further on too) and thereby its bias, or its part
// of dbias, in registers. The slices' sums of dbias go to partials [slices, F or 2F] fp32, which
// column_sum.cu adds up.
#include "layernorm_ffn/cuda/activation.cuh"
#include "layernorm_ffn/cuda/column_sum.cuh"
#include "layernorm_ffn/cuda/elementwise.cuh"
#include "layernorm_ffn/cuda/kernels.h"

namespace bigkern::layernorm_ffn::cuda {
namespace {

constexpr int kBackwardBlocks = 8;  // at least, on a processor: dropout may not take registers away

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
__global__ void __launch_bounds__(kElementThreads)
    bias_activation_kernel(BiasActivationParams call) {
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
      RowDropout(call.dropout, kHidden, m).apply(out, column);
      store_vec(static_cast<T*>(call.out) + m * F + column, out);
    }
  });
}

template <class T, int WIDTH>
__global__ void __launch_bounds__(kElementThreads, kBackwardBlocks)
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
      const RowDropout dropout(call.dropout, kHidden, m);
      load_vec(static_cast<const T*>(call.dout) + m * F + column, dout);
      dropout.apply(dout, column);
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
      if (call.out == nullptr) continue;
      dropout.apply(out, column);
      store_vec(static_cast<T*>(call.out) + m * F + column, out);
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

const Kernel<Forward> kForward[] = {
    elementwise<bf16, 8>("bias_activation bf16", bias_activation_kernel<bf16, 8>),
    elementwise<bf16, 1>("bias_activation bf16 scalar", bias_activation_kernel<bf16, 1>),
    elementwise<fp16, 8>("bias_activation fp16", bias_activation_kernel<fp16, 8>),
    elementwise<fp16, 1>("bias_activation fp16 scalar", bias_activation_kernel<fp16, 1>),
    elementwise<float, 4>("bias_activation fp32", bias_activation_kernel<float, 4>),
    elementwise<float, 1>("bias_activation fp32 scalar", bias_activation_kernel<float, 1>),
};

const Kernel<Backward> kBackward[] = {
    elementwise<bf16, 8>("bias_activation_backward bf16", bias_activation_backward_kernel<bf16, 8>),
    elementwise<bf16, 1>("bias_activation_backward bf16 scalar",
                         bias_activation_backward_kernel<bf16, 1>),
    elementwise<fp16, 8>("bias_activation_backward fp16", bias_activation_backward_kernel<fp16, 8>),
    elementwise<fp16, 1>("bias_activation_backward fp16 scalar",
                         bias_activation_backward_kernel<fp16, 1>),
    elementwise<float, 4>("bias_activation_backward fp32",
                          bias_activation_backward_kernel<float, 4>),
    elementwise<float, 1>("bias_activation_backward fp32 scalar",
                          bias_activation_backward_kernel<float, 1>),
};

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
  return launch(kernel->function, grid_for(*kernel, p.M, p.F), dim3(kElementThreads), 0,
                static_cast<cudaStream_t>(stream), p);
}

size_t bias_activation_backward_workspace(const BiasActivationBackwardParams& p) {
  const int64_t slices = p.M == 0 ? 0 : grid_for(*kernel_for(p), p.M, p.F).y;
  const int64_t columns = is_gated(p.activation) ? 2 * p.F : p.F;
  return p.dbias == nullptr ? 0 : size_t(slices * columns) * sizeof(float);
}

int bias_activation_backward(const BiasActivationBackwardParams& p, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  int64_t slices = 0;
  if (p.M > 0) {
    const auto* kernel = kernel_for(p);
    const dim3 grid = grid_for(*kernel, p.M, p.F);
    const int error = launch(kernel->function, grid, dim3(kElementThreads), 0, stream, p);
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
