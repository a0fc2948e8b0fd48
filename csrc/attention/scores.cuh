// From dot products to scores, and what the launchers of the three big kernels share.
#pragma once

#include "attention/kernels.h"
#include "attention/tile.cuh"
#include "common/launch.cuh"

namespace bigkern::attention::cuda {

// Query i sees keys j <= i + diagonal. Lengths stay below kMaxLength, so that without a causal rule
// a diagonal of kMaxLength lets every query see every key, and no sum of an index and a diagonal
// overflows.

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

// The scores of one query head. MASKED kernels read mask and bias; the others
// never look whether there are any.
template <class T, bool MASKED>
struct Scores {
  float scale;  // times kUnit
  int Sq, Sk, diagonal;
  const uint8_t* mask;  // of this head
  const T* bias;
  int64_t mask_row, mask_column, bias_row, bias_column;

  __device__ __forceinline__ Scores(const Shape& shape, int diagonal_, int64_t b, int64_t h)
      : scale(shape.scale * kUnit<T>), Sq(int(shape.Sq)), Sk(int(shape.Sk)), diagonal(diagonal_) {
    if constexpr (MASKED) {
      mask = static_cast<const uint8_t*>(shape.mask.data);
      if (mask != nullptr) mask += b * shape.mask.batch + h * shape.mask.head;
      bias = static_cast<const T*>(shape.bias.data);
      if (bias != nullptr) bias += b * shape.bias.batch + h * shape.bias.head;
      mask_row = shape.mask.row, mask_column = shape.mask.column;
      bias_row = shape.bias.row, bias_column = shape.bias.column;
    }
  }

  // Whether some query from i on does not see some key up to j.
  __device__ __forceinline__ bool partial(int i, int j) const {
    return j >= Sk || j > i + diagonal;
  }

  // Whether query i sees key j, as far as lengths and the causal rule go.
  __device__ __forceinline__ bool sees(int i, int j) const {
    return i < Sq && j < Sk && j <= i + diagonal;
  }
  __device__ __forceinline__ float bias_at(int i, int j) const {
    return sees(i, j) ? to_float(bias[i * bias_row + j * bias_column]) * kUnit<T> : 0.0f;
  }
  __device__ __forceinline__ bool mask_at(int i, int j) const {
    return sees(i, j) && mask[i * mask_row + j * mask_column] != 0;
  }
};

// Calls f(score, query, key) for each score of a strip whose first row and column are these queries
// and keys, or, with KEYS_ARE_ROWS, keys and queries.
template <bool KEYS_ARE_ROWS, int N, class F>
__device__ __forceinline__ void for_each_score(float (&s)[N][4], int row0, int column0, F f) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = row0 + row_of(e), column = column0 + n * 8 + column_of(e);
      f(s[n][e], KEYS_ARE_ROWS ? column : row, KEYS_ARE_ROWS ? row : column);
    }
  }
}

// Turns the products q k^T of a strip into scores, -inf where a query does not see a key. `partial`
// is whether there is such a place.
template <bool KEYS_ARE_ROWS, int N, class T, bool MASKED>
__device__ __forceinline__ void to_scores(float (&s)[N][4], const Scores<T, MASKED>& scores,
                                          bool partial, int row0, int column0) {
  const auto each = [&](auto f) { for_each_score<KEYS_ARE_ROWS>(s, row0, column0, f); };
  each([&](float& x, int, int) { x *= scores.scale; });
  if constexpr (MASKED) {
    if (scores.bias != nullptr) each([&](float& x, int i, int j) { x += scores.bias_at(i, j); });
    if (scores.mask != nullptr) {
      each([&](float& x, int i, int j) { x = scores.mask_at(i, j) ? x : -INFINITY; });
    }
  }
  if (partial) each([&](float& x, int i, int j) { x = scores.sees(i, j) ? x : -INFINITY; });
}

// ---- for the host
// --------------------------------------------------------------------------------

// One instantiation of a kernel; each .cu file has a table of its own.
template <class Call>
struct Kernel {
  const char* name;
  Dtype dtype;
  int64_t head_dim;  // the largest it can do
  bool masked;
  void (*function)(Call, int diagonal);
  int rows;  // queries, or keys, of a block
  int threads;
  size_t smem;
};

inline int diagonal_of(const Shape& shape) {
  return int(std::min(shape.sequence(0).offset + shape.right, kMaxLength));
}

// Launches the table's first kernel that can do this call, one block for each `rows` of the S rows
// of `heads` heads.
template <class Call, size_t N>
int launch_from(const Kernel<Call> (&table)[N], const Call& call, int64_t S, int64_t heads,
                void* stream) {
  const Shape& shape = call.shape;
  const bool masked = shape.mask.data != nullptr || shape.bias.data != nullptr;
  for (const Kernel<Call>& kernel : table) {
    if (kernel.dtype != shape.dtype || kernel.masked != masked) continue;
    if (kernel.head_dim < shape.D || kernel.head_dim < shape.Dv) continue;
    const int64_t blocks = ceil_div(S, kernel.rows) * heads;
    if (blocks == 0) return cudaSuccess;
    if (shape.Sq >= kMaxLength || shape.Sk >= kMaxLength || blocks > INT32_MAX) break;
    return launch(kernel.function, dim3(unsigned(blocks)), dim3(kernel.threads), kernel.smem,
                  static_cast<cudaStream_t>(stream), call, diagonal_of(shape));
  }
  return cudaErrorInvalidValue;
}

template <class Call, size_t N>
int list(const Kernel<Call> (&table)[N], KernelInfo* out, int capacity) {
  for (size_t i = 0; i < N && int(i) < capacity; ++i) {
    out[i] = kernel_info(table[i].name, table[i].function, table[i].smem);
  }
  return int(N);
}

}  // namespace bigkern::attention::cuda
