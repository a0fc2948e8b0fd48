// How a row of N columns lies across threads, for the norm kernels.
//
// A team of threads owns a row: a warp (four rows to a block), or a whole block. Each thread holds
// up to four 16-byte vectors of the row in registers, strided by the team, so that neighbouring
// threads load neighbouring vectors:
//
//   row   | vec 0 .. TEAM-1 | vec TEAM .. 2 TEAM-1 | ...     thread t: vectors t, TEAM + t, ...
//
// A row that is longer is streamed instead: read again from memory (in practice from L2) by each
// pass over it. So is one that is not aligned to 16 bytes, one element at a time.
#pragma once

#include "common/cuda/reduce.cuh"
#include "layernorm_ffn/cuda/dropout.cuh"
#include "layernorm_ffn/cuda/table.cuh"

namespace bigkern::layernorm_ffn::cuda {

constexpr int kHeldVectors = 4;
constexpr int kMinBlock = 128;         // threads; smaller teams share a block
constexpr int kMaxThreadsPerSm = 512;  // of kernels that may take 128 registers a thread

template <class Scalar, int TEAM, bool HELD, bool WIDE = HELD>
struct Layout {
  using T = Scalar;
  static constexpr int kTeam = TEAM;
  static constexpr bool kHeld = HELD;
  static constexpr int kWidth = WIDE ? kVecWidth<T> : 1;  // elements to one access
  static constexpr int kChunks =
      HELD ? kHeldVectors : 1;  // accesses whose values stay in registers
  static constexpr int kThreads = TEAM < kMinBlock ? kMinBlock : TEAM;
  static constexpr int kRows = kThreads / TEAM;  // to a block
  static constexpr int64_t kMaxColumns = HELD ? int64_t(TEAM) * kWidth * kChunks : int64_t(1) << 30;

  // f(chunk, column) for each access of this thread: columns column .. column + kWidth - 1.
  template <class F>
  static __device__ __forceinline__ void each(int N, const F& f) {
    const int lane = int(threadIdx.x) % TEAM;
    if constexpr (HELD) {
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int column = (chunk * TEAM + lane) * kWidth;
        if (column < N) f(chunk, column);
      }
    } else {
      for (int column = lane * kWidth; column < N; column += TEAM * kWidth) f(0, column);
    }
  }

  // The sum of the team's values, for every thread of it; scratch is shared, [kThreads / 32].
  static __device__ __forceinline__ float sum(float value, float* scratch) {
    if constexpr (TEAM == kWarpSize) return warp_sum(value);
    return block_sum<TEAM>(value, scratch);
  }
};

// One row of a matrix as its team reads it: once into registers, or anew with every get.
template <class L>
class Row {
  using T = typename L::T;

 public:
  __device__ __forceinline__ void load(const T* row, int N) {
    row_ = row;
    if constexpr (L::kHeld) {
      L::each(N,
              [&](int chunk, int column) { held_[chunk] = load_vec<T, L::kWidth>(row + column); });
    }
  }

  // sum = drop(x) + residual, rounded to T; that rounded sum is this row.
  __device__ __forceinline__ void load_sum(const T* x, const T* residual, T* sum, int N,
                                           const RowDropout& dropout) {
    row_ = sum;
    L::each(N, [&](int chunk, int column) {
      float total[L::kWidth], other[L::kWidth];
      load_vec(x + column, total);
      load_vec(residual + column, other);
      dropout.apply(total, column);
      Vec<T, L::kWidth> rounded;
#pragma unroll
      for (int i = 0; i < L::kWidth; ++i) rounded.data[i] = from_float<T>(total[i] + other[i]);
      store_vec(sum + column, rounded);
      held_[chunk] = rounded;
    });
  }

  __device__ __forceinline__ Vec<T, L::kWidth> get(int chunk, int column) const {
    if constexpr (L::kHeld) return held_[chunk];
    return load_vec<T, L::kWidth>(row_ + column);
  }

 private:
  const T* row_;
  Vec<T, L::kWidth> held_[L::kChunks];
};

template <class L, class Function>
constexpr Kernel<Function> instance(const char* name, Function function) {
  return {
      name,    DtypeOf<typename L::T>::value, L::kMaxColumns, L::kWidth > 1, L::kThreads, L::kRows,
      function};
}

// A piece of a vector, `missing` where there is none.
template <class T, int WIDTH>
__device__ __forceinline__ Vec<T, WIDTH> load_or(const void* vector, int64_t column,
                                                 float missing) {
  if (vector != nullptr) return load_vec<T, WIDTH>(static_cast<const T*>(vector) + column);
  Vec<T, WIDTH> values;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) values.data[i] = from_float<T>(missing);
  return values;
}

}  // namespace bigkern::layernorm_ffn::cuda
