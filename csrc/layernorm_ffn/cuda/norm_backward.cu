// LayerNorm and RMSNorm backward in one pass over dy and s.
//
//   xhat = (s - mean) * rstd          g = dy * weight
//   ds   = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum         mean(g) for layer only
//   dx   = drop(ds)
//   dweight = sum over rows of dy * xhat          dbias = sum over rows of dy
//
// Blocks are persistent: each walks over every gridDim-th row and keeps its own sums of dweight and
// dbias, in registers, from its first row to its last:
//
//   block b:  row b -> ds      row b + grid -> ds      ...      partials[b] = {dweight, dbias} fp32
//
// and column_sum.cu adds up the blocks' sums, always in the same order. s stays in registers
// between the two passes over a row; dy is read again, while the cache still has it, because the
// sums leave no registers for it. For a row that does not fit (row.cuh) the sums live in
// partials[b] from the start, which only this block touches.
#include "layernorm_ffn/cuda/column_sum.cuh"
#include "layernorm_ffn/cuda/kernels.h"
#include "layernorm_ffn/cuda/row.cuh"

namespace bigkern::layernorm_ffn::cuda {
namespace {

// A block's fp32 sum over its rows of one gradient [N].
template <class L>
class ColumnSum {
 public:
  // partial is [N], this block's own; null where the gradient is not wanted.
  __device__ __forceinline__ ColumnSum(float* partial, int N) : partial_(partial) {
    if constexpr (L::kHeld) {
#pragma unroll
      for (int chunk = 0; chunk < L::kChunks; ++chunk) {
#pragma unroll
        for (int i = 0; i < L::kWidth; ++i) held_[chunk][i] = 0.0f;
      }
    } else if (partial != nullptr) {
      L::each(N, [&](int, int column) {
#pragma unroll
        for (int i = 0; i < L::kWidth; ++i) partial[column + i] = 0.0f;
      });
    }
  }

  __device__ __forceinline__ void add(int chunk, int column, int i, float value) {
    if constexpr (L::kHeld) {
      held_[chunk][i] += value;
    } else if (partial_ != nullptr) {
      partial_[column + i] += value;
    }
  }

  // Writes the sum to partial; the block's teams take turns. All threads of the block come here.
  __device__ __forceinline__ void finish(int N) {
    if constexpr (L::kHeld) {
      if (partial_ == nullptr) return;
      for (int team = 0; team < L::kRows; ++team) {
        if (int(threadIdx.x) / L::kTeam == team) add_to_partial(N, team == 0);
        if (L::kRows > 1) __syncthreads();
      }
    }
  }

 private:
  __device__ __forceinline__ void add_to_partial(int N, bool first) {
    L::each(N, [&](int chunk, int column) {
#pragma unroll
      for (int i = 0; i < L::kWidth; ++i) {
        partial_[column + i] = held_[chunk][i] + (first ? 0.0f : partial_[column + i]);
      }
    });
  }

  float* partial_;
  float held_[L::kChunks][L::kWidth];
};

// Stores a piece of ds or dx. Where a row is held no register is left: with store_vec nvcc 13.0
// spills up to 16 bytes, and an assignment, which it takes apart elsewhere, stays whole here.
// tests/gate_nvcc.py looks at both.
template <class L>
__device__ __forceinline__ void store_piece(typename L::T* gmem,
                                            const Vec<typename L::T, L::kWidth>& values) {
  if constexpr (L::kHeld) {
    assert_aligned<int(sizeof values)>(gmem);
    *reinterpret_cast<Vec<typename L::T, L::kWidth>*>(gmem) = values;
  } else {
    store_vec(gmem, values);
  }
}

template <class L>
__global__ void __launch_bounds__(L::kThreads, kMaxThreadsPerSm / L::kThreads)
    norm_backward_kernel(NormBackwardParams p) {
  using T = typename L::T;
  __shared__ float scratch[L::kThreads / kWarpSize];
  const int N = int(p.N);
  const float inverse_N = 1.0f / float(N);
  float* const partials = static_cast<float*>(p.workspace) + int64_t(blockIdx.x) * 2 * N;
  ColumnSum<L> dweight(p.dweight != nullptr ? partials : nullptr, N);
  ColumnSum<L> dbias(p.dbias != nullptr ? partials + N : nullptr, N);

  const int64_t step = int64_t(gridDim.x) * L::kRows;
  for (int64_t m = int64_t(blockIdx.x) * L::kRows + threadIdx.x / L::kTeam; m < p.M; m += step) {
    Row<L> s;
    s.load(static_cast<const T*>(p.s) + m * N, N);
    const T* dy = static_cast<const T*>(p.dy) + m * N;
    const float mean = p.norm == Norm::layer ? p.mean[m] : 0.0f;
    const float rstd = p.rstd[m];

    float sum_g = 0.0f, sum_gx = 0.0f;
    L::each(N, [&](int chunk, int column) {
      const auto weight = load_or<T, L::kWidth>(p.weight, column, 1.0f);
      const auto d = load_vec<T, L::kWidth>(dy + column);
      const auto v = s.get(chunk, column);
#pragma unroll
      for (int i = 0; i < L::kWidth; ++i) {
        const float g = to_float(d.data[i]) * to_float(weight.data[i]);
        sum_g += g;
        sum_gx += g * ((to_float(v.data[i]) - mean) * rstd);
      }
    });
    const float mean_gx = L::sum(sum_gx, scratch) * inverse_N;
    const float mean_g = p.norm == Norm::layer ? L::sum(sum_g, scratch) * inverse_N : 0.0f;

    const T* dsum = p.dsum == nullptr ? nullptr : static_cast<const T*>(p.dsum) + m * N;
    T* ds = static_cast<T*>(p.ds) + m * N;
    T* dx = p.dx == nullptr ? nullptr : static_cast<T*>(p.dx) + m * N;
    const RowDropout dropout(p.dropout, kOutput, m);
    L::each(N, [&](int chunk, int column) {
      const auto weight = load_or<T, L::kWidth>(p.weight, column, 1.0f);
      const auto through = load_or<T, L::kWidth>(dsum, column, 0.0f);
      const auto d = load_vec<T, L::kWidth>(dy + column);
      auto v = s.get(chunk, column);
#pragma unroll
      for (int i = 0; i < L::kWidth; ++i) {
        const float dy_i = to_float(d.data[i]);
        const float xhat = (to_float(v.data[i]) - mean) * rstd;
        const float centred = dy_i * to_float(weight.data[i]) - mean_g - xhat * mean_gx;
        v.data[i] = from_float<T>(rstd * centred + to_float(through.data[i]));
        dweight.add(chunk, column, i, dy_i * xhat);
        dbias.add(chunk, column, i, dy_i);
      }
      store_piece<L>(ds + column, v);
      if (dx == nullptr) return;
      float dropped[L::kWidth];
#pragma unroll
      for (int i = 0; i < L::kWidth; ++i) dropped[i] = to_float(v.data[i]);
      dropout.apply(dropped, column);
#pragma unroll
      for (int i = 0; i < L::kWidth; ++i) v.data[i] = from_float<T>(dropped[i]);
      store_piece<L>(dx + column, v);
    });
  }
  dweight.finish(N);
  dbias.finish(N);
}

template <class T, int TEAM, bool HELD, bool WIDE = HELD>
constexpr Kernel<void (*)(NormBackwardParams)> backward(const char* name) {
  using L = Layout<T, TEAM, HELD, WIDE>;
  return instance<L>(name, norm_backward_kernel<L>);
}

const Kernel<void (*)(NormBackwardParams)> kTable[] = {
    backward<bf16, 32, true>("norm_backward bf16 1024"),  // up to 1024 columns, a warp each row
    backward<bf16, 128, true>("norm_backward bf16 4096"),
    backward<bf16, 256, true>("norm_backward bf16 8192"),
    backward<bf16, 512, true>("norm_backward bf16 16384"),
    backward<bf16, 512, false, true>("norm_backward bf16 wide"),
    backward<bf16, 128, false>("norm_backward bf16 streamed"),
    backward<fp16, 32, true>("norm_backward fp16 1024"),
    backward<fp16, 128, true>("norm_backward fp16 4096"),
    backward<fp16, 256, true>("norm_backward fp16 8192"),
    backward<fp16, 512, true>("norm_backward fp16 16384"),
    backward<fp16, 512, false, true>("norm_backward fp16 wide"),
    backward<fp16, 128, false>("norm_backward fp16 streamed"),
    backward<float, 32, true>("norm_backward fp32 512"),
    backward<float, 128, true>("norm_backward fp32 2048"),
    backward<float, 256, true>("norm_backward fp32 4096"),
    backward<float, 512, true>("norm_backward fp32 8192"),
    backward<float, 512, false, true>("norm_backward fp32 wide"),
    backward<float, 128, false>("norm_backward fp32 streamed"),
};

const Kernel<void (*)(NormBackwardParams)>* kernel_for(const NormBackwardParams& p) {
  const bool aligned = rows_aligned(p.dtype, p.N, p.dy, p.dsum, p.s, p.weight, p.ds, p.dx);
  return find(kTable, p.dtype, p.N, aligned);
}

// As many blocks as the device runs at once, but none without a row.
int64_t blocks_for(const NormBackwardParams& p) {
  int multiprocessors = 1;
  multiprocessor_count(&multiprocessors);
  const auto* kernel = kernel_for(p);
  const int64_t resident = int64_t(multiprocessors) * (kMaxThreadsPerSm / kernel->threads);
  return min(resident, (p.M + kernel->rows - 1) / kernel->rows);
}

}  // namespace

size_t norm_backward_workspace(const NormBackwardParams& p) {
  return size_t(blocks_for(p)) * 2 * size_t(p.N) * sizeof(float);
}

int norm_backward(const NormBackwardParams& p, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const int64_t blocks = blocks_for(p);
  if (blocks > 0) {
    const auto* kernel = kernel_for(p);
    const int error =
        launch(kernel->function, dim3(unsigned(blocks)), dim3(kernel->threads), 0, stream, p);
    if (error != cudaSuccess) return error;
  }
  if (p.dweight == nullptr && p.dbias == nullptr) return cudaSuccess;
  return column_sum({static_cast<const float*>(p.workspace), blocks, p.N, 2, p.dweight, p.dbias},
                    p.dtype, stream);
}

int norm_backward_kernels(KernelInfo* out, int capacity) { return list(kTable, out, capacity); }

}  // namespace bigkern::layernorm_ffn::cuda
