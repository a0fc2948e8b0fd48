// Tiles of q, k, v, do in shared memory, and their way from and to global memory.
//
//   global, one head                     shared [ROWS, kPitch<T, D>]
//   row0 ->  . . . . . .|                . . . . . . 0 0 | 16 bytes unused
//            . . . . . .| columns   =>   . . . . . . 0 0 |
//   count -> -----------                 0 0 0 0 0 0 0 0 |
//
// What lies outside the tensor becomes zero, so that the products need no bounds. The unused 16
// bytes shift each row by four banks: the eight rows that one ldmatrix reads lie in different
// banks.
#pragma once

#include "attention/attention.h"
#include "common/cuda/ptx.cuh"
#include "common/cuda/reduce.cuh"

namespace bigkern::attention::cuda {

// Elements from one row of a tile to the next.
template <class T, int D>
constexpr int kPitch = D + kVecWidth<T>;

BIGKERN_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ __forceinline__ int lane() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ int warp() { return threadIdx.x / kWarpSize; }

// An accumulator of m16n8 is four floats in each lane: entry e of lane l is this row and this
// column.
__device__ __forceinline__ int row_of(int e) { return lane() / 4 + e / 2 * 8; }
__device__ __forceinline__ int column_of(int e) { return lane() % 4 * 2 + e % 2; }

// The rows of one sequence and head of a tensor, which T makes const or not.
template <class T>
struct Rows {
  T* data;
  int64_t stride;  // elements
  int count, columns;
  bool vectors;  // every row begins and ends at a multiple of 16 bytes
};

template <class T, class Pointer>
__device__ __forceinline__ Rows<T> rows_of(const View<Pointer>& x, int64_t b, int64_t h,
                                           int64_t first, int count, int64_t columns) {
  T* data = static_cast<T*>(x.data) + b * x.batch + h * x.head + first * x.row;
  const uint64_t bytes = uint64_t(x.row | columns) * sizeof(T);
  return {data, x.row, count, int(columns), (reinterpret_cast<uint64_t>(data) | bytes) % 16 == 0};
}

// Starts copying rows [row0, row0 + ROWS) into a tile; all THREADS threads of the block take part.
// The tile is there after cp_async_wait and a barrier.
template <int ROWS, int D, int THREADS, class T>
__device__ __forceinline__ void load_tile(T* tile, const Rows<const T>& x, int row0) {
  if (x.vectors) {
    constexpr int kWidth = kVecWidth<T>, kAcross = D / kWidth, kDown = THREADS / kAcross;
    static_assert(THREADS % kAcross == 0 && ROWS % kDown == 0,
                  "some threads would have nothing to copy");
    const int row = threadIdx.x / kAcross, column = threadIdx.x % kAcross * kWidth;
    const T* source = x.data + (row0 + row) * x.stride + column;
    T* destination = tile + row * kPitch<T, D> + column;
#pragma unroll
    for (int down = 0; down < ROWS; down += kDown) {
      const bool valid = row0 + row + down < x.count && column < x.columns;
      ptx::cp_async_16(destination + down * kPitch<T, D>, source, valid);
      source += kDown * x.stride;
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * D; i += THREADS) {
      const int row = i / D, column = i % D;
      const bool valid = row0 + row < x.count && column < x.columns;
      tile[row * kPitch<T, D> + column] =
          valid ? x.data[(row0 + row) * x.stride + column] : from_float<T>(0.0f);
    }
  }
}

// Two neighbours in one store to shared memory.
template <class T>
__device__ __forceinline__ void store_pair(T* smem, float first, float second) {
  assert_aligned<2 * int(sizeof(T))>(smem);
  *reinterpret_cast<Vec<T, 2>*>(smem) = {from_float<T>(first), from_float<T>(second)};
}

// Writes a warp's accumulators, times `scale[e / 2]`, to rows row0 to row0 + 15 and columns column0
// to column0 + C - 1. They go by way of `strip`, 16 rows of a tile that this warp alone uses, so
// that global memory sees whole vectors.
template <int D, int C, class T>
__device__ __forceinline__ void store_strip(const Rows<T>& x, int row0, int column0,
                                            const float (&acc)[C / 8][4], const float (&scale)[2],
                                            T* strip) {
  constexpr int kWidth = kVecWidth<T>;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < C / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      store_pair(strip + row_of(e) * kPitch<T, D> + column0 + n * 8 + column_of(e),
                 acc[n][e] * scale[e / 2], acc[n][e + 1] * scale[e / 2]);
    }
  }
  __syncwarp();
  const int rows = min(16, x.count - row0), columns = min(C, x.columns - column0);
  const int width = x.vectors ? kWidth : 1;
#pragma unroll 1
  for (int i = lane() * width; i < 16 * C; i += kWarpSize * width) {
    const int row = i / C, column = i % C;
    if (row >= rows || column >= columns) continue;
    const T* from = strip + row * kPitch<T, D> + column0 + column;
    T* to = x.data + (row0 + row) * x.stride + column0 + column;
    if (x.vectors) {
      store_vec(to, load_vec(from));
    } else {
      *to = *from;
    }
  }
}

}  // namespace bigkern::attention::cuda
