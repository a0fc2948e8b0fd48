// What the two passes of attention's backward share.
//
//   p = exp(s - lse)     delta = rowsum(do * o)     ds = p * (do v^T - delta)
//
//   dkdv.cu    dv = p^T do           dk = scale * ds^T q      a block owns keys and goes through
//   the queries dq.cu      dq = scale * ds k                              a block owns queries and
//   goes through the keys
//
// Both compute s and do v^T again: seven products where five would do if dq were summed with
// atomics. In return the result is the same on every run, and no workspace of q's size is needed.
#pragma once

#include "attention/product.cuh"
#include "attention/scores.cuh"

namespace bigkern::attention::cuda {

// A block owns ROWS rows of one side (k and v, or q and do) and goes through the other side
// STREAMED rows at a time, in STAGES buffers. Each warp owns 16 rows and, of their gradients,
// COLUMNS columns: as many as there are registers for. Where that is not all, SPLIT warps do the
// same 16 rows, and compute the same p and ds. A block takes at most 99 KiB, so that every GPU from
// sm_80 on can run it.
template <class T, int D, bool TWO_GRADIENTS>
struct BackwardTile {
  static constexpr int kRowBytes = D * int(sizeof(T));
  static constexpr int ROWS = kRowBytes <= 512 ? 64 : 32;
  static constexpr int STREAMED = kRowBytes <= 128 ? 64 : kRowBytes == 256 ? 32 : 16;
  static constexpr int STAGES = kRowBytes <= 512 ? 2 : 1;
  static constexpr int kWarpBytes = TWO_GRADIENTS ? 256 : 512;  // of a row of each gradient
  static constexpr int SPLIT = kRowBytes > kWarpBytes ? kRowBytes / kWarpBytes : 1;
  static constexpr int COLUMNS = D / SPLIT;
  static constexpr int THREADS = ROWS / 16 * SPLIT * kWarpSize;
  static constexpr int kTile = ROWS * kPitch<T, D>;          // elements
  static constexpr int kStreamed = STREAMED * kPitch<T, D>;  // elements
  static constexpr size_t SMEM = size_t(2 * kTile + 2 * STAGES * kStreamed) * sizeof(T);
};

BIGKERN_HD int64_t padded_queries(int64_t Sq) { return ceil_div(Sq, kQueryPad) * kQueryPad; }

// For each query, its lse times kUnit, +inf where it has nothing to attend to, and its delta.
struct RowStatistics {
  const float *lse, *delta;  // of one head
};

__device__ __forceinline__ RowStatistics statistics_of(const Backward& call, int64_t b, int64_t h) {
  const Shape& shape = call.shape;
  const int64_t padded = padded_queries(shape.Sq);
  const float* lse = static_cast<const float*>(call.workspace) + (b * shape.Hq + h) * padded;
  return {lse, lse + shape.B * shape.Hq * padded};
}

// s and do v^T of a strip become p and ds.
template <class T>
__device__ __forceinline__ void to_p_and_ds(float& s, float& dp, float lse, float delta) {
  s = exp_of<T>(s - lse);
  dp = s * (dp - delta);
}

}  // namespace bigkern::attention::cuda
