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

#include "common/cuda/ptx.cuh"
#include "common/cuda/reduce.cuh"

namespace bigkern::recurrent::cuda {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kTileRows = 16, kTileUnits = 8;  // of an mma
constexpr int kTileValues = kTileRows * kTileUnits;
constexpr int kTiles = 2;  // of rows, in a pass: a value for each thread
static_assert(kTiles * kTileValues == kThreads, "one value each");

__device__ __forceinline__ int lane() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ int warp() { return threadIdx.x / kWarpSize; }

// A chunk is what is multiplied between two loads: kDepth<T> columns of the exchange.
template <class T>
constexpr int kDepth = 32;
template <>
inline constexpr int kDepth<float> = 8;

template <class T>
constexpr int kFragment = kTileUnits * kDepth<T>;  // elements of a chunk of weights

// On tensor cores, two mma. The order of k within an mma is the operands' own affair: lane % 4 has
// four in a row, of row lane / 4 and of the one 8 below in A, of column lane / 4 in B. Both lie as
// the registers take them, so that a lane's share is 16 bytes, of one mma of A, of both of B.
template <class T>
struct Chunk {
  struct A {
    uint4 mma[2];
  };
  struct B {
    uint4 mma;
  };
  // Where an element lies: of the exchange, of a chunk of weights.
  static __device__ __forceinline__ int64_t in_rows(int row, int k, int64_t pitch) {
    const int r = row % kTileRows, lane = r % 8 * 4 + k % 16 / 4;
    return (row - r) * pitch + k / 16 * 256 + lane * 8 + k % 4 / 2 * 4 + r / 8 * 2 + k % 2;
  }
  static __device__ __forceinline__ int in_weights(int column, int k) {
    const int lane = column * 4 + k % 16 / 4;
    return lane * 8 + k / 16 * 4 + k % 4;
  }

  static __device__ __forceinline__ void load(A& a, const T* tile, int chunk, int64_t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      a.mma[i] = detail::words_of<uint4>(load_vec(tile + (chunk * 2 + i) * 256 + lane() * 8));
    }
  }
  static __device__ __forceinline__ void load(B& b, const T* weights) {
    b.mma = detail::words_of<uint4>(load_vec(weights + lane() * 8));
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b) {
    ptx::mma_m16n8k16<T>(d, {a.mma[0].x, a.mma[0].y, a.mma[0].z, a.mma[0].w}, {b.mma.x, b.mma.y});
    ptx::mma_m16n8k16<T>(d, {a.mma[1].x, a.mma[1].y, a.mma[1].z, a.mma[1].w}, {b.mma.z, b.mma.w});
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
  static __device__ __forceinline__ int64_t in_rows(int row, int k, int64_t pitch) {
    return row * pitch + k;
  }
  static __device__ __forceinline__ int in_weights(int column, int k) {
    return k / 4 * (4 * kTileUnits) + column * 4 + k % 4;
  }

  static __device__ __forceinline__ void load(A& a, const float* tile, int chunk, int64_t pitch) {
    const float* const row = tile + lane() / 4 * pitch + chunk * kDepth<float>;
    load8(a.k[0], row, 4);
    load8(a.k[1], row + 8 * pitch, 4);
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

// Chunks of a warp's that travel at once: 32 registers of them, and as many that are multiplied.
template <class T>
constexpr int kAhead = 32 / (kTiles * int(sizeof(typename Chunk<T>::A) / sizeof(uint32_t)));

// Operands of the rows: kAhead chunks of this warp's, `tiles` tiles of them.
template <class T>
struct Batch {
  typename Chunk<T>::A a[kAhead<T>][kTiles];

  __device__ __forceinline__ void load(const T* rows, int64_t pitch, int tiles, int chunk,
                                       int chunks) {
#pragma unroll
    for (int i = 0; i < kAhead<T>; ++i, chunk += kWarps) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (tile < tiles && chunk < chunks) {
          Chunk<T>::load(a[i][tile], rows + tile * kTileRows * pitch, chunk, pitch);
        }
      }
    }
  }
};

// This warp's part of rows[tiles * 16, k] times N tiles of columns, to `parts` in shared memory.
// The weights lie as [chunks, N, kFragment].
template <int N, class T>
__device__ __forceinline__ void multiply(float* parts, int tiles, const T* rows, int64_t pitch,
                                         const T* weights, int chunks) {
  float sum[kTiles][N][4] = {};
  Batch<T> now = {}, next = {};
  now.load(rows, pitch, tiles, warp(), chunks);
#pragma unroll 2
  for (int first = warp(); first < chunks; first += kAhead<T> * kWarps) {
    next.load(rows, pitch, tiles, first + kAhead<T> * kWarps, chunks);
#pragma unroll
    for (int i = 0; i < kAhead<T>; ++i) {
      const int chunk = first + i * kWarps;
      if (chunk >= chunks) break;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        typename Chunk<T>::B b;
        Chunk<T>::load(b, weights + (chunk * N + n) * kFragment<T>);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          if (tile < tiles) Chunk<T>::multiply(sum[tile][n], now.a[i][tile], b);
        }
      }
    }
    now = next;
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
    weights[to * kFragment<T> + Chunk<T>::in_weights(column, k % kDepth<T>)] =
        unit < H && k < H ? w[row * H + from] : from_float<T>(0.0f);
  }
}

}  // namespace bigkern::recurrent::cuda
