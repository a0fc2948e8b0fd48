// How the work lies on the GPU: what the scan and its backward share besides the product.
//
// A block owns a slice of the hidden units of one direction, for a group of rows, and keeps their
// recurrent weights in shared memory over all steps. What a step needs of the other slices goes
// through `exchange` in global memory, which L2 holds, in two halves that alternate:
//
//                 hidden units ->
//              slice 0   slice 1   ...            grid (slices, groups, directions)
//   group 0  | block   | block   |     |  rows
//   group 1  | block   | block   |     |  0..B    blocks of a row of this picture wait for each
//   ...      |         |         |     |          other once a step; no others do
#pragma once

#include "common/cuda/grid_barrier.cuh"
#include "recurrent/cuda/product.cuh"
#include "recurrent/recurrent.h"

namespace bigkern::recurrent::cuda {

// How a call is shared out.
struct Plan {
  int slices, unit_tiles;  // a slice has unit_tiles * 8 hidden units
  int groups, group_rows;  // a multiple of 16
  int tiles;               // of rows, in a pass
  int chunks;              // of kDepth hidden units
  size_t smem;
  unsigned* counters;  // [D, groups], kCounterStride apart
  void* exchange;      // [D, 2, B to a multiple of 16, pitch] of the dtype
  float* state;        // [2, D, B, H]
};

constexpr int kCounterStride = 32;  // elements: a cache line each

template <class Call>
struct Work {
  Call call;
  Plan plan;
};

// Tiles that hold so many rows; none if there are less than none.
BIGKERN_HD int tiles_of(int rows) { return (max(rows, 0) + kTileRows - 1) / kTileRows; }

// A part of a step: rows [row, end) of the batch, up to kTiles tiles, and eight hidden units.
struct Pass {
  int row, end, unit;
  int unit_tile;     // of the block's
  bool first, last;  // of the step
};

// This thread's value of a pass. The parts hold it where an accumulator of mma has it: entry e of a
// lane is row lane / 4 + e / 2 * 8, column lane % 4 * 2 + e % 2.
struct Value {
  int tile, entry;  // in the parts: [tiles, N, kTileValues]
  int row, unit;

  __device__ __forceinline__ explicit Value(const Pass& pass)
      : tile(int(threadIdx.x) / kTileValues), entry(int(threadIdx.x) % kTileValues) {
    const int lane = entry / 4, e = entry % 4;
    row = pass.row + tile * kTileRows + lane / 4 + e / 2 * 8;
    unit = pass.unit + lane % 4 * 2 + e % 2;
  }

  // The product, for tile n of N: the sum of all warps' parts.
  template <int N>
  __device__ __forceinline__ float sum(const float* parts, int tiles, int n) const {
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      total += parts[((warp * tiles + tile) * N + n) * kTileValues + entry];
    }
    return total;
  }
};

// What this block owns.
template <class T>
struct Share {
  int d;  // direction
  int unit0, unit_tiles;
  int row0, row_end;  // its group's
  int64_t B, H, D;
  int64_t pitch, half;  // of the exchange, elements
  T* exchange;          // of its direction
  float* state;         // the same
  unsigned* counter;
  unsigned blocks;  // that share the counter

  // `columns`: how many values a row of the exchange has for each hidden unit.
  __device__ __forceinline__ Share(const Plan& plan, const Sizes& of, int columns)
      : d(int(blockIdx.z)),
        unit0(int(blockIdx.x) * plan.unit_tiles * kTileUnits),
        unit_tiles(plan.unit_tiles),
        row0(int(blockIdx.y) * plan.group_rows),
        row_end(min(int(of.B), row0 + plan.group_rows)),
        B(of.B),
        H(of.H),
        D(of.D),
        pitch(int64_t(columns) * plan.chunks * kDepth<T>),
        half((B + kTileRows - 1) / kTileRows * kTileRows * pitch),
        exchange(static_cast<T*>(plan.exchange) + 2 * d * half),
        state(plan.state + d * B * H),
        counter(plan.counters + (d * plan.groups + int(blockIdx.y)) * kCounterStride),
        blocks(unsigned(plan.slices)) {}

  // Of the half of the exchange that an even or odd `step` means: a tile, from `row` on; a value.
  __device__ __forceinline__ T* tile(int step, int row) const {
    return exchange + (step & 1) * half + row * pitch;
  }
  __device__ __forceinline__ T& exchanged(int step, int row, int column) const {
    return tile(step, 0)[Chunk<T>::in_rows(row, column, pitch)];
  }
  // The two fp32 values that are kept of each hidden unit from step to step.
  __device__ __forceinline__ float& kept(int which, int row, int unit) const {
    return state[which * D * B * H + row * H + unit];
  }
  // Element (row, unit) of a tensor [rows, D, G, H].
  __device__ __forceinline__ int64_t at(int64_t row, int unit, int G = 1, int g = 0) const {
    return ((row * D + d) * G + g) * H + unit;
  }

  // The step's passes, one at least: f(pass).
  template <class F>
  __device__ __forceinline__ void each_pass(int tiles, int rows_end, const F& f) const {
    const int rows = tiles * kTileRows;
    for (int row = row0; row == row0 || row < rows_end; row += rows) {
      for (int u = 0; u < unit_tiles; ++u) {
        f(Pass{row, min(rows_end, row + rows), unit0 + u * kTileUnits, u, row == row0 && u == 0,
               row + rows >= rows_end && u == unit_tiles - 1});
      }
    }
  }

  // Ends a pass: its parts may be overwritten, and what the step exchanged is there for all.
  __device__ __forceinline__ void passed(const Pass& pass) const {
    if (pass.last) {
      grid_arrive(counter);
    } else {
      __syncthreads();
    }
  }

  // All that the block owns: f(row, unit, index in a tensor [D, B, H]).
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    const int units = unit_tiles * kTileUnits;
    for (int i = int(threadIdx.x); i < (row_end - row0) * units; i += kThreads) {
      const int row = row0 + i / units, unit = unit0 + i % units;
      if (unit < H) f(row, unit, (d * B + row) * H + unit);
    }
  }
};

// The steps of a direction, up or down in t.
class Walk {
 public:
  int64_t first;  // this step's first row, of all
  int rows;       // 0 past the last step
  int next_rows;

  __device__ __forceinline__ Walk(const Sizes& of, bool up)
      : batch_sizes_(of.batch_sizes), B_(int(of.B)), T_(of.T), t_(up ? 0 : of.T - 1), up_(up) {
    rows = size(t_);
    first = up ? 0 : of.N - rows;
    next_rows = size(next());
  }
  __device__ __forceinline__ int64_t next_first() const {
    return up_ ? first + rows : first - next_rows;
  }
  __device__ __forceinline__ void advance() {
    first = next_first();
    rows = next_rows;
    t_ = next();
    next_rows = size(next());
  }

 private:
  __device__ __forceinline__ int64_t next() const { return up_ ? t_ + 1 : t_ - 1; }
  __device__ __forceinline__ int size(int64_t t) const {
    if (t < 0 || t >= T_) return 0;
    return batch_sizes_ == nullptr ? B_ : int(batch_sizes_[t]);
  }

  const int64_t* batch_sizes_;
  int B_;
  int64_t T_, t_;
  bool up_;
};

}  // namespace bigkern::recurrent::cuda
