// Where the rows of one sequence are, and which keys its queries see.
//
//              keys ->                         query i sees keys i + low .. i + high
//            . x x x . . . .
//   queries  . . x x x . . .     here low = 1 and high = 3. Both count from the query's own index,
//      |     . . . x x x . .     so that one rule serves causal, sliding and unlimited windows, at
//      v     . . . . x x x .     either corner.
#pragma once

#include "attention/cuda/tile.cuh"

namespace bigkern::attention::cuda {

struct Range {
  int begin, end;
};

struct Window {
  int64_t q_begin, k_begin;  // rows of q and k before this sequence
  int Sq, Sk, offset;
  int low, high;  // no further out than matters, so that no sum of two such numbers overflows

  __device__ __forceinline__ Window(const Shape& shape, int b) : Window(shape, shape.sequence(b)) {}

  __device__ __forceinline__ Window(const Shape& shape, const Sequence& s) {
    q_begin = s.q_begin, k_begin = s.k_begin;
    Sq = int(s.Sq), Sk = int(s.Sk), offset = int(s.offset);
    low = int(max(s.offset - shape.left, -s.Sq));
    high = int(min(s.offset + shape.right, s.Sk));
  }

  // The keys that some query of [i, i_end) sees; the queries that see some key of [j, j_end).
  __device__ __forceinline__ Range keys_of(int i, int i_end) const {
    return {max(0, i + low), min(Sk, min(i_end, Sq) + high)};
  }
  __device__ __forceinline__ Range queries_of(int j, int j_end) const {
    return {max(0, j - high), min(Sq, min(j_end, Sk) - low)};
  }

  __device__ __forceinline__ bool sees(int i, int j) const {
    return i < Sq && j < Sk && j <= i + high && j >= i + low;
  }
};

// The 16 rows of scores that a warp has, one query each, or, with KEYS_ARE_ROWS, one key.
template <bool KEYS_ARE_ROWS>
struct Strip {
  int row0;
  Range whole;  // columns where all rows see, or are seen by, everything

  __device__ __forceinline__ Strip(const Window& window, int row0_) : row0(row0_) {
    const int last = row0 + 15;
    if constexpr (KEYS_ARE_ROWS) {
      whole = {last - window.high, last < window.Sk ? row0 - window.low + 1 : -1};
    } else {
      whole = {last + window.low, min(window.Sk, row0 + window.high + 1)};
    }
  }
  __device__ __forceinline__ bool partial(int column0, int columns) const {
    return column0 < whole.begin || column0 + columns > whole.end;
  }
};

}  // namespace bigkern::attention::cuda
