// Products of a warp's 16-row strip with a tile, on tensor cores: mma.sync with float accumulators.
//
//   dot_rows     s[16, N]    = A[16, D] B[N, D]^T      A and B in shared memory: q k^T, do v^T
//   accumulate   acc[16, C] += P[16, N] B[N, C]        P in accumulators, B in shared memory: p v
//
// bf16 and fp16 use m16n8k16 as it is. float32 is held to the accuracy of IEEE float32 arithmetic:
// each operand is split into two tf32 numbers, x = high + low within 2^-24 x, and three of the four
// partial products are taken (3xTF32). Tensor cores truncate where they add to an accumulator, an
// error that all goes one way, so sums longer than four mma steps are added up outside, rounding to
// nearest (Ootomo and Yokota, Recovering single precision accuracy from Tensor Cores, 2022).
#pragma once

#include "attention/cuda/tile.cuh"

namespace bigkern::attention::cuda {

// How many columns of A one mma multiplies: 32 bytes of a row.
template <class T>
constexpr int kDepth = 32 / int(sizeof(T));

constexpr int kStepsPerSum = 4;  // mma steps before a float32 sum leaves the tensor core

// The registers of one mma operand: N = 4 for A, 2 for B.
template <class T, int N>
struct Fragment {
  uint32_t bits[N];
  __device__ __forceinline__ void set(int i, uint32_t two_values) { bits[i] = two_values; }
};
template <int N>
struct Fragment<float, N> {
  uint32_t high[N], low[N];
  __device__ __forceinline__ void set(int i, uint32_t value) {
    constexpr uint32_t kTf32Bits = 0xffffe000u;  // cvt leaves the other bits undefined
    high[i] = ptx::to_tf32(__uint_as_float(value)) & kTf32Bits;
    low[i] = ptx::to_tf32(__uint_as_float(value) - __uint_as_float(high[i]));
  }
};

// A sum of a few mma steps, on the way to the sum of all.
template <class T>
struct Sum {
  float d[4];

  __device__ __forceinline__ explicit Sum(const float (&total)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) d[e] = total[e];
  }
  __device__ __forceinline__ void add(const Fragment<T, 4>& a, const Fragment<T, 2>& b) {
    ptx::mma_m16n8k16<T>(d, a.bits, b.bits);
  }
  __device__ __forceinline__ void store(float (&total)[4]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) total[e] = d[e];
  }
};

// For float32 the small products are summed apart. So q k^T and its transpose come out the same to
// the last bit, and exp(s - lse) in the backward is what it was in the forward.
template <>
struct Sum<float> {
  float large[4] = {}, small[4] = {};

  __device__ __forceinline__ explicit Sum(const float (&)[4]) {}
  __device__ __forceinline__ void add(const Fragment<float, 4>& a, const Fragment<float, 2>& b) {
    ptx::mma_m16n8k8_tf32(small, a.low, b.high);
    ptx::mma_m16n8k8_tf32(small, a.high, b.low);
    ptx::mma_m16n8k8_tf32(large, a.high, b.high);
  }
  __device__ __forceinline__ void store(float (&total)[4]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) total[e] += large[e] + small[e];
  }
};

// ---- operands from shared memory
// -----------------------------------------------------------------

// A of one mma: 16 rows of a tile, kDepth columns from x on.
template <int D, class T>
__device__ __forceinline__ Fragment<T, 4> load_a(const T* x) {
  uint32_t bits[4];
  ptx::ldmatrix_x4(bits, x + lane() % 16 * kPitch<T, D> + lane() / 16 * kVecWidth<T>);
  Fragment<T, 4> a;
#pragma unroll
  for (int i = 0; i < 4; ++i) a.set(i, bits[i]);
  return a;
}

// B of two neighbouring mma, B[k][n] = x[n][k]: 16 rows of a tile, kDepth columns.
template <int D, class T>
__device__ __forceinline__ void load_b(Fragment<T, 2> (&b)[2], const T* x) {
  uint32_t bits[4];
  const int row = lane() / 16 * 8 + lane() % 8;
  ptx::ldmatrix_x4(bits, x + row * kPitch<T, D> + lane() / 8 % 2 * kVecWidth<T>);
#pragma unroll
  for (int i = 0; i < 4; ++i) b[i / 2].set(i % 2, bits[i]);
}

// B of two neighbouring mma, B[k][n] = x[k][n]: kDepth rows of a tile, 16 columns. ldmatrix
// transposes 16-bit values only. For float, operand row quad is tile row 2*quad and operand row
// quad + 4 is tile row 2*quad + 1: the order of the accumulator columns that a_of() takes for A.
template <int D, class T>
__device__ __forceinline__ void load_b_transposed(Fragment<T, 2> (&b)[2], const T* x) {
  if constexpr (std::is_same_v<T, float>) {
    const T* const pair = x + lane() % 4 * 2 * kPitch<T, D> + lane() / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      b[i / 2].set(i % 2, __float_as_uint(pair[i % 2 * kPitch<T, D> + i / 2 * 8]));
    }
  } else {
    uint32_t bits[4];
    ptx::ldmatrix_x4_trans(bits, x + lane() % 16 * kPitch<T, D> + lane() / 16 * kVecWidth<T>);
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2].set(i % 2, bits[i]);
  }
}

// A of one mma from accumulators: columns step * kDepth on. Two accumulators side by side hold
// 16-bit A's registers as they are; one of them holds float's, with its columns in another order.
template <class T, int N>
__device__ __forceinline__ Fragment<T, 4> a_of(const float (&p)[N][4], int step) {
  Fragment<T, 4> a;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      a.set(i, __float_as_uint(p[step][i % 2 * 2 + i / 2]));
    } else {
      const float (&half)[4] = p[2 * step + i / 2];
      a.set(i, ptx::pack2<T>(half[i % 2 * 2], half[i % 2 * 2 + 1]));
    }
  }
  return a;
}

// ---- products
// ------------------------------------------------------------------------------------

// s[16, N] = a[16, D] b[N, D]^T.
template <int N, int D, class T>
__device__ __forceinline__ void dot_rows(float (&s)[N / 8][4], const T* a, const T* b) {
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = 0.0f;
  }
#pragma unroll(std::is_same_v<T, float> ? 1 : D)
  for (int k = 0; k < D; k += kStepsPerSum * kDepth<T>) {
    Fragment<T, 4> a_steps[kStepsPerSum];
#pragma unroll
    for (int step = 0; step < kStepsPerSum; ++step)
      a_steps[step] = load_a<D>(a + k + step * kDepth<T>);
#pragma unroll
    for (int n = 0; n < N / 8; n += 2) {
      Sum<T> left(s[n]), right(s[n + 1]);
#pragma unroll
      for (int step = 0; step < kStepsPerSum; ++step) {
        Fragment<T, 2> b_pair[2];
        load_b<D>(b_pair, b + n * 8 * kPitch<T, D> + k + step * kDepth<T>);
        left.add(a_steps[step], b_pair[0]);
        right.add(a_steps[step], b_pair[1]);
      }
      left.store(s[n]);
      right.store(s[n + 1]);
    }
  }
}

// acc[16, C] += p[16, N] b[N, C], b being C columns of a tile of D.
template <int N, int C, int D, class T>
__device__ __forceinline__ void accumulate(float (&acc)[C / 8][4], const float (&p)[N / 8][4],
                                           const T* b) {
  constexpr int kSteps = N / kDepth<T>;
  static_assert(!std::is_same_v<T, float> || kSteps <= kStepsPerSum, "the sum grows too long");
  Fragment<T, 4> a_steps[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) a_steps[step] = a_of<T>(p, step);
#pragma unroll
  for (int c = 0; c < C / 8; c += 2) {
    Sum<T> left(acc[c]), right(acc[c + 1]);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Fragment<T, 2> b_pair[2];
      load_b_transposed<D>(b_pair, b + step * kDepth<T> * kPitch<T, D> + c * 8);
      left.add(a_steps[step], b_pair[0]);
      right.add(a_steps[step], b_pair[1]);
    }
    left.store(acc[c]);
    right.store(acc[c + 1]);
  }
}

}  // namespace bigkern::attention::cuda
