// From dot products to scores, and what the launchers of the big kernels share.
#pragma once

#include "attention/cuda/kernels.h"
#include "attention/cuda/window.cuh"
#include "common/cuda/launch.cuh"

namespace bigkern::attention::cuda {

// Scores are kept times kUnit: log2(e) for 16-bit inputs, so that exp costs one instruction. For
// float32 that is too rough: a score of 500 would be rounded a second time, and p with it by 3e-5.
constexpr float kLog2e = 1.44269504f;
template <class T>
constexpr float kUnit = std::is_same_v<T, float> ? 1.0f : kLog2e;

// exp of a difference of two scores.
template <class T>
__device__ __forceinline__ float exp_of(float x) {
  return ptx::exp2_approx(std::is_same_v<T, float> ? x * kLog2e : x);
}

// For 16-bit inputs within 2e-7, absolutely: two instructions of the special function unit where
// tanhf takes twenty of all kinds.
template <class T>
__device__ __forceinline__ float tanh_of(float x) {
  if constexpr (std::is_same_v<T, float>) return tanhf(x);
  return 1.0f - 2.0f * ptx::rcp_approx(1.0f + ptx::exp2_approx(2.0f * kLog2e * x));
}

// What the kept weights are multiplied by.
__device__ __forceinline__ float dropout_scale(const Shape& shape) {
  return shape.dropout.active() ? shape.dropout.scale : 1.0f;
}

// A head's number, or `none` where heads have none.
__device__ __forceinline__ float value_of(const PerHead& x, int b, int h, float none) {
  return x.data != nullptr ? x.data[b * x.batch + h] : none;
}

// A query's number, or `none` where queries have none.
template <class Pointer>
__device__ __forceinline__ float value_of(const Statistic<Pointer>& x, int b, int h, int64_t row,
                                          float none) {
  return x.data != nullptr ? x.data[b * x.batch + h * x.head + row] : none;
}

// The scores of one query head. GENERAL kernels look for everything that Shape::general() means;
// the others never do. Whether a call has some feature is the same for all threads, so that each is
// a branch around a pass over the strip. What a pass needs is looked up there: it would only take
// registers from the products.
template <class T, bool GENERAL>
struct Scores {
  const Shape& shape;
  int b, h;

  __device__ __forceinline__ float scale() const { return shape.scale * kUnit<T>; }
  __device__ __forceinline__ bool capped() const { return GENERAL && shape.softcap != 0.0f; }
  __device__ __forceinline__ bool dropped() const { return GENERAL && shape.dropout.active(); }
};

// Calls f(entry, query, key) for each entry of a strip from these columns on.
template <bool KEYS_ARE_ROWS, int N, class F>
__device__ __forceinline__ void for_each_score(float (&s)[N][4], const Strip<KEYS_ARE_ROWS>& strip,
                                               int column0, F f) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = strip.row0 + row_of(e), column = column0 + n * 8 + column_of(e);
      f(s[n][e], KEYS_ARE_ROWS ? column : row, KEYS_ARE_ROWS ? row : column);
    }
  }
}

// Calls f(score, entry) for each score that is seen, with its entry of a broadcast tensor. One
// pointer goes along the strip: an address for each entry would take as many registers as scores.
template <class E, bool KEYS_ARE_ROWS, int N, class T, class F>
__device__ __forceinline__ void for_each_entry(float (&s)[N][4], const Scores<T, true>& scores,
                                               const Strip<KEYS_ARE_ROWS>& strip, int column0,
                                               const Broadcast<const void*>& x, F f) {
  const Window window(scores.shape, scores.b);
  const int64_t down = KEYS_ARE_ROWS ? x.column : x.row, across = KEYS_ARE_ROWS ? x.row : x.column;
  const E* entry = static_cast<const E*>(x.data) + scores.b * x.batch + scores.h * x.head +
                   (strip.row0 + row_of(0)) * down + (column0 + column_of(0)) * across;
#pragma unroll
  for (int n = 0; n < N; ++n, entry += 8 * across) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = strip.row0 + row_of(e), column = column0 + n * 8 + column_of(e);
      if (window.sees(KEYS_ARE_ROWS ? column : row, KEYS_ARE_ROWS ? row : column)) {
        f(s[n][e], entry[e / 2 * 8 * down + e % 2 * across]);
      }
    }
  }
}

// Adds bias and slopes to scores, and makes them -inf where the mask forbids.
template <bool KEYS_ARE_ROWS, int N, class T>
__device__ __forceinline__ void add_biases(float (&s)[N][4], const Scores<T, true>& scores,
                                           const Strip<KEYS_ARE_ROWS>& strip, int column0) {
  const Shape& shape = scores.shape;
  if (shape.bias.data != nullptr) {
    for_each_entry<T>(s, scores, strip, column0, shape.bias,
                      [](float& x, T bias) { x += to_float(bias) * kUnit<T>; });
  }
  if (shape.slopes.data != nullptr) {
    const int offset = Window(shape, scores.b).offset;
    const float slope = value_of(shape.slopes, scores.b, scores.h, 0.0f) * kUnit<T>;
    for_each_score(s, strip, column0,
                   [&](float& x, int i, int j) { x -= slope * float(abs(i + offset - j)); });
  }
  if (shape.mask.data != nullptr) {
    for_each_entry<uint8_t>(s, scores, strip, column0, shape.mask,
                            [](float& x, uint8_t seen) { x = seen ? x : -INFINITY; });
  }
}

// Turns scaled and capped products into scores.
template <bool KEYS_ARE_ROWS, int N, class T, bool GENERAL>
__device__ __forceinline__ void restrict_scores(float (&s)[N][4], const Scores<T, GENERAL>& scores,
                                                const Strip<KEYS_ARE_ROWS>& strip, int column0) {
  if constexpr (GENERAL) add_biases(s, scores, strip, column0);
  if (strip.partial(column0, N * 8)) {
    const Window window(scores.shape, scores.b);
    for_each_score(s, strip, column0,
                   [&](float& x, int i, int j) { x = window.sees(i, j) ? x : -INFINITY; });
  }
}

// Calls f(entry, whether dropout keeps it) for each entry of a strip.
template <bool KEYS_ARE_ROWS, int N, class T, class F>
__device__ __forceinline__ void for_each_draw(float (&p)[N][4], const Scores<T, true>& scores,
                                              const Strip<KEYS_ARE_ROWS>& strip, int column0, F f) {
  const Shape& shape = scores.shape;
  const DropoutHead head = shape.dropout.head(uint32_t(scores.b * shape.Hq + scores.h));
  for_each_score(p, strip, column0, [&](float& x, int i, int j) {
    f(x, head.row(uint32_t(i)).bits(uint32_t(j)) >= shape.dropout.threshold);
  });
}

// Caps a score, and returns the tanh that it did it with.
template <class T>
__device__ __forceinline__ float cap(float& x, float softcap) {
  const float most = softcap * kUnit<T>, inverse = 1.0f / most;
  const float t = tanh_of<T>(x * inverse);
  x = most * t;
  return t;
}

// ---- for the host
// --------------------------------------------------------------------------------

// One instantiation of a kernel; each .cu file has a table of its own.
template <class Call>
struct Kernel {
  const char* name;
  Dtype dtype;
  int64_t head_dim;  // the largest it can do
  bool general;
  void (*function)(Call);
  int rows;  // queries, or keys, of a block
  int threads;
  size_t smem;
  int columns = 0;  // keys of a block that owns a tile of the scores
};

// The table's first kernel that can do this call, or null.
template <class Call, size_t N>
const Kernel<Call>* kernel_for(const Kernel<Call> (&table)[N], const Shape& shape, bool general) {
  if (shape.Sq >= kMaxLength || shape.Sk >= kMaxLength) return nullptr;
  for (const Kernel<Call>& kernel : table) {
    if (kernel.dtype == shape.dtype && kernel.general == general && kernel.head_dim >= shape.D &&
        kernel.head_dim >= shape.Dv) {
      return &kernel;
    }
  }
  return nullptr;
}

template <class Call>
int launch_blocks(const Kernel<Call>* kernel, const Call& call, int64_t blocks, void* stream) {
  if (kernel == nullptr || blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  return launch(kernel->function, dim3(unsigned(blocks)), dim3(kernel->threads), kernel->smem,
                static_cast<cudaStream_t>(stream), call);
}

// One block for each `rows` of the S rows of `heads` heads.
template <class Call, size_t N>
int launch_from(const Kernel<Call> (&table)[N], const Call& call, int64_t S, int64_t heads,
                void* stream) {
  const Kernel<Call>* const kernel = kernel_for(table, call.shape, call.shape.general());
  const int64_t blocks = kernel == nullptr ? 0 : ceil_div(S, kernel->rows) * heads;
  return launch_blocks(kernel, call, blocks, stream);
}

template <class Call, size_t N>
int list(const Kernel<Call> (&table)[N], KernelInfo* out, int capacity) {
  for (size_t i = 0; i < N && int(i) < capacity; ++i) {
    out[i] = kernel_info(table[i].name, table[i].function, table[i].smem);
  }
  return int(N);
}

}  // namespace bigkern::attention::cuda
