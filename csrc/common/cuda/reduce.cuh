// Reductions over a warp and a block, and vector loads and stores.
#pragma once

#include "common/cuda/cuda.cuh"
#include "common/cuda/ptx.cuh"

namespace bigkern {

struct SumOp {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

struct MaxOp {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Combines the values of LANES neighbouring lanes (a power of two); all of them get the result.
template <int LANES, class Op>
__device__ __forceinline__ float warp_reduce(float value, Op op) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    value = op(value, __shfl_xor_sync(kFullMask, value, distance));
  }
  return value;
}

template <int LANES = kWarpSize>
__device__ __forceinline__ float warp_sum(float value) {
  return warp_reduce<LANES>(value, SumOp{});
}

template <int LANES = kWarpSize>
__device__ __forceinline__ float warp_max(float value) {
  return warp_reduce<LANES>(value, MaxOp{});
}

// Combines the values of a one-dimensional block of THREADS threads; all of them get the same
// result. scratch is shared, [THREADS / 32] floats, and free again when the function returns.
template <int THREADS, class Op>
__device__ __forceinline__ float block_reduce(float value, float* scratch, Op op) {
  static_assert(THREADS % kWarpSize == 0, "a block is whole warps");
  constexpr int kWarps = THREADS / kWarpSize;
  value = warp_reduce<kWarpSize>(value, op);
  if (kWarps == 1) return value;
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) value = op(value, scratch[warp]);
  __syncthreads();
  return value;
}

template <int THREADS>
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  return block_reduce<THREADS>(value, scratch, SumOp{});
}

template <int THREADS>
__device__ __forceinline__ float block_max(float value, float* scratch) {
  return block_reduce<THREADS>(value, scratch, MaxOp{});
}

// N values that travel in one memory instruction; the address is aligned to all of them together.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16, "one instruction moves at most 16 bytes");
  T data[N];
};

// As many values of T as one 16-byte access holds.
template <class T>
constexpr int kVecWidth = 16 / int(sizeof(T));

template <class T, int N = kVecWidth<T>>
__device__ __forceinline__ Vec<T, N> load_vec(const T* address) {
  assert_aligned<int(sizeof(T)) * N>(address);
  return *reinterpret_cast<const Vec<T, N>*>(address);
}

namespace detail {
template <class Words, class T, int N>
__device__ __forceinline__ Words words_of(const Vec<T, N>& values) {
  static_assert(sizeof(Words) == sizeof values, "as many bytes");
  Words words;
  memcpy(&words, &values, sizeof words);
  return words;
}
}  // namespace detail

// To global memory only.
template <class T, int N>
__device__ __forceinline__ void store_vec(T* gmem, const Vec<T, N>& values) {
  assert_aligned<int(sizeof(T)) * N>(gmem);
  if constexpr (sizeof values == 16) {
    ptx::store_global(gmem, detail::words_of<uint4>(values));
  } else if constexpr (sizeof values == 8) {
    ptx::store_global(gmem, detail::words_of<uint2>(values));
  } else {
    *reinterpret_cast<Vec<T, N>*>(gmem) = values;
  }
}

// The same with the conversion to and from float.
template <class T, int N>
__device__ __forceinline__ void load_vec(const T* address, float (&values)[N]) {
  const Vec<T, N> packed = load_vec<T, N>(address);
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = to_float(packed.data[i]);
}

template <class T, int N>
__device__ __forceinline__ void store_vec(T* gmem, const float (&values)[N]) {
  Vec<T, N> packed;
#pragma unroll
  for (int i = 0; i < N; ++i) packed.data[i] = from_float<T>(values[i]);
  store_vec(gmem, packed);
}

}  // namespace bigkern
