// Parameters cut into chunks, one block each: the table that a kernel finds its share of work by.
//
//   parameter        |     0     |  1  |        2        | 3 |
//   chunk = block    |0 |1 |2 |3 |4 |5 |6 |7 |8 |9 |10|11|12 |        first_chunk = 0 4 6 12 (13)
//
// The table travels as a kernel parameter (32 KB since CUDA 12.1). So nothing has to be allocated,
// copied or kept alive, and a CUDA graph replays it as it was captured. kCapacity parameters fit; a
// longer list takes more launches.
#pragma once

#include "adam/adam.h"
#include "common/cuda/cuda.cuh"

namespace bigkern::adam::cuda {

constexpr int kCapacity = 352;              // parameters in a table
constexpr size_t kLargestArgument = 32764;  // bytes of parameters that a kernel takes

// A grid has at most 2^31 - 1 blocks. A parameter beyond them, 8 T elements, fits no GPU.
constexpr int64_t kMaxChunks = (int64_t(1) << 31) - 1;

struct Chunks {
  int count;  // of parameters
  int first_chunk[kCapacity + 1];
  Parameter parameters[kCapacity];

  int total() const { return first_chunk[count]; }
};

inline int64_t chunks_of(const Parameter& x, int chunk) { return (x.n + chunk - 1) / chunk; }

// Takes as many parameters as fit, cut into chunks of `chunk` elements; returns how many.
inline int64_t fill(Chunks& table, const Parameter* parameters, int64_t count, int chunk) {
  int64_t chunks = 0;
  int taken = 0;
  while (taken < count && taken < kCapacity &&
         chunks + chunks_of(parameters[taken], chunk) <= kMaxChunks) {
    table.parameters[taken] = parameters[taken];
    table.first_chunk[taken] = int(chunks);
    chunks += chunks_of(parameters[taken], chunk);
    ++taken;
  }
  table.count = taken;
  table.first_chunk[taken] = int(chunks);
  return taken;
}

// Elements begin to end of one parameter.
struct Share {
  int parameter;
  int64_t begin, end;
};

// The block's share; a parameter without elements has none.
template <int CHUNK>
__device__ __forceinline__ Share share_of(const Chunks& table, int chunk) {
  int low = 0, high = table.count;  // first_chunk[low] <= chunk < first_chunk[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int64_t begin = int64_t(chunk - table.first_chunk[low]) * CHUNK;
  const int64_t n = table.parameters[low].n;
  return {low, begin, begin + CHUNK < n ? begin + CHUNK : n};
}

}  // namespace bigkern::adam::cuda
