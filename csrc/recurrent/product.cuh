// The product of a step: 16-row tiles of the exchange times eight columns of weights that stay in
// shared memory.
//
// A block's eight warps cut k among themselves, chunk after chunk. Each leaves its part of the sums
// in shared memory; then each thread adds up the parts of a row's hidden unit, all gates of it.
//
//   k ->      warp 0   1   2  ...  7   0   1  ...         parts [8, tiles, N, 128] fp32
//           +--------+---+---+---+---+---+---+
//   rows    | chunk  |   |   |   |   |   |   |  exchange, in global memory: L2
//           +--------+---+---+---+---+---+---+
//   N * 8   | chunk  |   |   |   |   |   |   |  weights, in shared memory: [chunks, N, 8 x kDepth]
//   columns +--------+---+---+---+---+---+---+
#pragma once

#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace bigkern::recurrent::cuda {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kTileRows = 16, kTileUnits = 8;            // of an mma
constexpr int kTileValues = kTileRows * kTileUnits;      // four in each lane
constexpr int kTiles = 4;                                // of rows, that a pass takes at most
constexpr int kItems = kTiles * kTileValues / kThreads;  // values of a pass in each thread

__device__ __forceinline__ int lane() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ int warp() { return threadIdx.x / kWarpSize; }

// A chunk is what is multiplied between two loads: kDepth<T> columns of the exchange. The order of
// k within it is the operands' own affair, so that a lane's share is 16 bytes in a row, of a row of
// the exchange (`A`, rows lane / 4 and lane / 4 + 8) as of a column of the weights (`B`).
template <class T>
constexpr int kDepth = 32;
template <>
inline constexpr int kDepth<float> = 8;

template <class T>
constexpr int kFragment = kTileUnits * kDepth<T>;  // elements of a chunk of weights

// Tensor cores: lane % 4 chooses the k, 8 of them, and two mma take four each.
template <class T>
struct Chunk {
  struct A {
    uint4 k[2];
  };
  struct B {
    uint4 k;
  };
  static __device__ __forceinline__ int at(int column, int k) { return column * kDepth<T> + k; }

  static __device__ __forceinline__ void load(A& a, const T* rows, int64_t pitch) {
    const T* const own = rows + lane() / 4 * pitch + lane() % 4 * 8;
    a.k[0] = detail::words_of<uint4>(load_vec(own));
    a.k[1] = detail::words_of<uint4>(load_vec(own + 8 * pitch));
  }
  static __device__ __forceinline__ void load(B& b, const T* weights) {
    b.k = detail::words_of<uint4>(load_vec(weights + lane() * 8));
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b) {
    ptx::mma_m16n8k16<T>(d, {a.k[0].x, a.k[1].x, a.k[0].y, a.k[1].y}, {b.k.x, b.k.y});
    ptx::mma_m16n8k16<T>(d, {a.k[0].z, a.k[1].z, a.k[0].w, a.k[1].w}, {b.k.z, b.k.w});
  }
};

// float32 has no tensor core of its accuracy: FMAs, into the same places of the accumulators.
template <>
struct Chunk<float> {
  struct A {
    float k[2][8];
  };
  struct B {
    float k[2][8];  // of columns lane % 4 * 2 and the next
  };
  static __device__ __forceinline__ int at(int column, int k) {
    return k / 4 * (4 * kTileUnits) + column * 4 + k % 4;
  }

  static __device__ __forceinline__ void load(A& a, const float* rows, int64_t pitch) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      load8(a.k[half], rows + (lane() / 4 + half * 8) * pitch, 4);
  }
  static __device__ __forceinline__ void load(B& b, const float* weights) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      load8(b.k[side], weights + (lane() % 4 * 2 + side) * 4, 4 * kTileUnits);
    }
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
#pragma unroll
      for (int e = 0; e < 4; ++e) d[e] = fmaf(a.k[e / 2][k], b.k[e % 2][k], d[e]);
    }
  }

 private:
  static __device__ __forceinline__ void load8(float (&k)[8], const float* first, int next) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const Vec<float, 4> four = load_vec(first + i / 4 * next);
#pragma unroll
      for (int j = 0; j < 4; ++j) k[i + j] = four.data[j];
    }
  }
};

// This warp's part of rows[tiles * 16, k] times N tiles of columns, to `parts` in shared memory.
// The weights lie as [chunks, N, kFragment].
template <int N, class T>
__device__ __forceinline__ void multiply(float* parts, int tiles, const T* rows, int64_t pitch,
                                         const T* weights, int chunks) {
  float sum[kTiles][N][4] = {};
#pragma unroll 2
  for (int chunk = warp(); chunk < chunks; chunk += kWarps) {
    typename Chunk<T>::A a[kTiles] = {};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile >= tiles) break;
      Chunk<T>::load(a[tile], rows + tile * kTileRows * pitch + chunk * kDepth<T>, pitch);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      typename Chunk<T>::B b;
      Chunk<T>::load(b, weights + (chunk * N + n) * kFragment<T>);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (tile < tiles) Chunk<T>::multiply(sum[tile][n], a[tile], b);
      }
    }
  }
  auto* own = reinterpret_cast<Vec<float, 4>*>(parts) + warp() * tiles * N * kWarpSize + lane();
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile >= tiles) break;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float (&d)[4] = sum[tile][n];
      own[(tile * N + n) * kWarpSize] = {d[0], d[1], d[2], d[3]};
    }
  }
}

// The weights that a share multiplies with, to shared memory: of each unit tile [chunks, G] tiles
// of W's rows, or, transposed, [G, chunks] tiles of its columns. Zero past the last hidden unit.
template <int G, bool TRANSPOSED, class T>
__device__ __forceinline__ void load_weights(T* weights, const void* w_hh, int H, int unit0,
                                             int unit_tiles, int chunks) {
  const T* const w = static_cast<const T*>(w_hh);
  const int depth = chunks * kDepth<T>;
#pragma unroll 4
  for (int i = int(threadIdx.x); i < unit_tiles * G * kTileUnits * depth; i += kThreads) {
    const int tile = i / (kTileUnits * depth), u = tile / G, g = tile % G;
    const int column = TRANSPOSED ? i % kTileUnits : i / depth % kTileUnits;
    const int k = TRANSPOSED ? i / kTileUnits % depth : i % depth;
    const int unit = unit0 + u * kTileUnits + column;
    const int64_t row = g * H + (TRANSPOSED ? k : unit), from = TRANSPOSED ? unit : k;
    const int chunk = k / kDepth<T>;
    const int to = TRANSPOSED ? tile * chunks + chunk : (u * chunks + chunk) * G + g;
    weights[to * kFragment<T> + Chunk<T>::at(column, k % kDepth<T>)] =
        unit < H && k < H ? w[row * H + from] : from_float<T>(0.0f);
  }
}

}  // namespace bigkern::recurrent::cuda
