// What the passes of attention's backward share.
//
//   p = exp(s - lse)               delta = rowsum(do * o) - dlse
//   dp = dropped (do v^T)          ds = p * (dp - delta)          dx = ds * (1 - (x / softcap)^2)
//
//   dkdv.cu    dv = (dropped p)^T do     dk = scale dx^T q     a block owns keys
//   dq.cu      dq = scale dx k                                 a block owns queries
//   dbias.cu   dbias = ds, summed                              a block owns a tile of the bias
//
// Each computes q k^T and do v^T again: seven products where five would do if dq were summed with
// atomics. In return the result is the same on every run, and no workspace of q's size is needed.
#pragma once

#include "attention/cuda/product.cuh"
#include "attention/cuda/scores.cuh"

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
  static constexpr int BLOCKS = kRowBytes <= 256 && !TWO_GRADIENTS && sizeof(T) == 2 ? 3 : 1;
  static constexpr int kTile = ROWS * kPitch<T, D>;          // elements
  static constexpr int kStreamed = STREAMED * kPitch<T, D>;  // elements
  static constexpr size_t SMEM = size_t(2 * kTile + 2 * STAGES * kStreamed) * sizeof(T);
};

BIGKERN_HD int64_t padded_queries(int64_t Sq) { return ceil_div(Sq, kQueryPad) * kQueryPad; }

// Where a sequence's queries begin among a head's row statistics, and how many of those there are.
// Sequence b, before which there are n queries, begins at the multiple of kQueryPad that this many
// whole pads and b further ones take: room for all that is padded, without a sum over b.
BIGKERN_HD int64_t statistics_begin(int64_t n, int64_t b) {
  return (n / kQueryPad + b) * kQueryPad;
}
BIGKERN_HD int64_t statistics_rows(const Shape& shape) {
  return statistics_begin(shape.rows_of_q(), shape.B);
}

// For each query, its lse times kUnit, +inf where it has nothing to attend to, and its delta.
template <class Float>
struct RowStatistics {
  Float *lse, *delta;  // of one sequence and head
};

template <class Float>
__device__ __forceinline__ RowStatistics<Float> statistics_of(const Backward& call,
                                                              const Window& window, int b, int h) {
  const Shape& shape = call.shape;
  const int64_t n = shape.q_begins != nullptr ? window.q_begin : int64_t(b) * shape.Sq;
  const int64_t rows = statistics_rows(shape);
  Float* const lse = static_cast<Float*>(call.workspace) + h * rows + statistics_begin(n, b);
  return {lse, lse + shape.Hq * rows};
}

// What the two queries have that a lane has of eight rows or columns of scores.
struct Terms {
  Vec<float, 2> lse, delta;
};

// Those of the rows from row0 on, where queries are rows; those of a lane's columns from `column`
// on.
__device__ __forceinline__ Terms terms_of_rows(const RowStatistics<const float>& x, int row0) {
  const int i = row0 + row_of(0);
  return {{{x.lse[i], x.lse[i + 8]}}, {{x.delta[i], x.delta[i + 8]}}};
}
__device__ __forceinline__ Terms terms_of_columns(const RowStatistics<const float>& x, int column) {
  return {load_vec<float, 2>(x.lse + column + column_of(0)),
          load_vec<float, 2>(x.delta + column + column_of(0))};
}

// The products q k^T and do v^T of a strip become p, zero where it is dropped, and dx, or, with
// OF_SCORES, ds. terms_of(n) is for columns 8 n .. 8 n + 7, or for any, where queries are rows.
template <bool OF_SCORES = false, bool KEYS_ARE_ROWS, int N, class T, bool GENERAL, class F>
__device__ __forceinline__ void to_gradients(float (&s)[N][4], float (&dp)[N][4],
                                             const Scores<T, GENERAL>& scores,
                                             const Strip<KEYS_ARE_ROWS>& strip, int column0,
                                             F terms_of) {
  static_assert(N * 4 <= 32, "one bit for each entry that a lane holds");
  const Shape& shape = scores.shape;
  const auto each = [&](auto f) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const Terms terms = terms_of(n);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int query = KEYS_ARE_ROWS ? e % 2 : e / 2;
        f(s[n][e], dp[n][e], terms.lse.data[query], terms.delta.data[query]);
      }
    }
  };
  uint32_t kept = 0, bit = 1;
  if constexpr (GENERAL) {
    if (scores.dropped()) {
      for_each_draw(dp, scores, strip, column0, [&](float& x, bool keep) {
        x = keep ? x * shape.dropout.scale : 0.0f;
        kept |= keep ? bit : 0;
        bit <<= 1;
      });
    }
  }
  each([&](float& x, float&, float, float) { x *= scores.scale(); });
  const bool weighed = scores.capped() && !OF_SCORES;  // delta is gone from dp by now
  if (scores.capped()) {
    each([&](float& x, float& ds, float, float delta) {
      const float t = cap<T>(x, shape.softcap);
      if (!OF_SCORES) ds = (ds - delta) * (1.0f - t * t);
    });
  }
  restrict_scores(s, scores, strip, column0);
  each([&](float& x, float& ds, float lse, float delta) {
    x = exp_of<T>(x - lse);
    ds = x * (weighed ? ds : ds - delta);
  });
  if (scores.dropped()) {
    each([&](float& p, float&, float, float) {
      p = kept & 1 ? p : 0.0f;
      kept >>= 1;
    });
  }
}

}  // namespace bigkern::attention::cuda
