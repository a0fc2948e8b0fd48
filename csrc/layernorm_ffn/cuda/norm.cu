// LayerNorm and RMSNorm forward, with the residual addition before them.
//
//   s = drop(x) + residual    mean = sum(s) / N          var = sum((s - mean)^2) / N
//   y = (s - mean) / sqrt(var + eps) * weight + bias                        rms: mean = 0
//
// One pass over memory: a row stays in its team's registers between the sums and the result
// (row.cuh), so that a row costs one read of x (and residual) and one write of y (and sum).
//
// The variance is taken from the differences to the mean, and the mean is then corrected by what
// the differences still sum to (Chan, Golub and LeVeque, Algorithms for computing the sample
// variance, 1983). A row with mean 1e4 and deviation 1e-2 keeps the digits that fp32 has for it.
#include "layernorm_ffn/cuda/kernels.h"
#include "layernorm_ffn/cuda/row.cuh"

namespace bigkern::layernorm_ffn::cuda {
namespace {

// y = (s - mean) - shift is s minus its true mean: shift is what rounding kept out of mean.
struct Moments {
  float mean, shift, rstd;
};

template <class L>
__device__ __forceinline__ Moments moments(const Row<L>& s, const NormParams& p, float* scratch) {
  const int N = int(p.N);
  const float inverse_N = 1.0f / float(N);
  float mean = 0.0f;
  if (p.norm == Norm::layer) {
    float sum = 0.0f;
    L::each(N, [&](int chunk, int column) {
      const auto v = s.get(chunk, column);
#pragma unroll
      for (int i = 0; i < L::kWidth; ++i) sum += to_float(v.data[i]);
    });
    mean = L::sum(sum, scratch) * inverse_N;
  }

  float difference = 0.0f, square = 0.0f;
  L::each(N, [&](int chunk, int column) {
    const auto v = s.get(chunk, column);
#pragma unroll
    for (int i = 0; i < L::kWidth; ++i) {
      const float d = to_float(v.data[i]) - mean;
      difference += d;
      square += d * d;
    }
  });
  square = L::sum(square, scratch) * inverse_N;
  if (p.norm == Norm::rms) return {0.0f, 0.0f, rsqrtf(square + p.eps)};
  const float shift = L::sum(difference, scratch) * inverse_N;
  const float variance = fmaxf(square - shift * shift, 0.0f);
  return {mean, shift, rsqrtf(variance + p.eps)};
}

template <class L>
__global__ void __launch_bounds__(L::kThreads, kMaxThreadsPerSm / L::kThreads)
    norm_kernel(NormParams p) {
  using T = typename L::T;
  __shared__ float scratch[L::kThreads / kWarpSize];
  const int64_t m = int64_t(blockIdx.x) * L::kRows + threadIdx.x / L::kTeam;
  if (m >= p.M) return;
  const int N = int(p.N);

  Row<L> s;
  const T* x = static_cast<const T*>(p.x) + m * N;
  if (p.residual != nullptr) {
    s.load_sum(x, static_cast<const T*>(p.residual) + m * N, static_cast<T*>(p.sum) + m * N, N,
               RowDropout(p.dropout, kOutput, m));
  } else {
    s.load(x, N);
  }
  const Moments of = moments<L>(s, p, scratch);

  T* y = static_cast<T*>(p.y) + m * N;
  L::each(N, [&](int chunk, int column) {
    const auto weight = load_or<T, L::kWidth>(p.weight, column, 1.0f);
    const auto bias = load_or<T, L::kWidth>(p.bias, column, 0.0f);
    auto v = s.get(chunk, column);
#pragma unroll
    for (int i = 0; i < L::kWidth; ++i) {
      const float xhat = (to_float(v.data[i]) - of.mean - of.shift) * of.rstd;
      v.data[i] = from_float<T>(xhat * to_float(weight.data[i]) + to_float(bias.data[i]));
    }
    store_vec(y + column, v);
  });
  if (threadIdx.x % L::kTeam == 0) {
    if (p.mean != nullptr) p.mean[m] = of.mean + of.shift;
    if (p.rstd != nullptr) p.rstd[m] = of.rstd;
  }
}

template <class T, int TEAM, bool HELD, bool WIDE = HELD>
constexpr Kernel<void (*)(NormParams)> forward(const char* name) {
  using L = Layout<T, TEAM, HELD, WIDE>;
  return instance<L>(name, norm_kernel<L>);
}

const Kernel<void (*)(NormParams)> kTable[] = {
    forward<bf16, 32, true>("norm bf16 1024"),  // up to 1024 columns, a warp each row
    forward<bf16, 128, true>("norm bf16 4096"),
    forward<bf16, 512, true>("norm bf16 16384"),
    forward<bf16, 512, false, true>("norm bf16 wide"),
    forward<bf16, 128, false>("norm bf16 streamed"),
    forward<fp16, 32, true>("norm fp16 1024"),
    forward<fp16, 128, true>("norm fp16 4096"),
    forward<fp16, 512, true>("norm fp16 16384"),
    forward<fp16, 512, false, true>("norm fp16 wide"),
    forward<fp16, 128, false>("norm fp16 streamed"),
    forward<float, 32, true>("norm fp32 512"),
    forward<float, 128, true>("norm fp32 2048"),
    forward<float, 512, true>("norm fp32 8192"),
    forward<float, 512, false, true>("norm fp32 wide"),
    forward<float, 128, false>("norm fp32 streamed"),
};

}  // namespace

int norm_forward(const NormParams& p, void* stream) {
  if (p.M == 0) return cudaSuccess;
  const bool aligned = rows_aligned(p.dtype, p.N, p.x, p.residual, p.weight, p.bias, p.y, p.sum);
  const auto* kernel = find(kTable, p.dtype, p.N, aligned);
  const int64_t blocks = (p.M + kernel->rows - 1) / kernel->rows;
  return launch(kernel->function, dim3(unsigned(blocks)), dim3(kernel->threads), 0,
                static_cast<cudaStream_t>(stream), p);
}

int norm_forward_kernels(KernelInfo* out, int capacity) { return list(kTable, out, capacity); }

}  // namespace bigkern::layernorm_ffn::cuda
