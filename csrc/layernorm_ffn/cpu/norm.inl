// LayerNorm and RMSNorm over rows, forward and backward, on the CPU.
//
//   x^ = (v - mean) rstd        y = x^ w + b
//   g = dy w                    dv = rstd (g - avg(g) - x^ avg(g x^))      avg over the row of N
//                               rms: mean = 0 and avg(g) drops out
//
// A row stays in L1 or L2 while it is passed over, so memory is read once and written once. The
// fp32 mean of a row near 1e4 is off by up to 5e-4, which a row with a tiny variance would feel:
// every pass therefore corrects it by `shift`, the average of v - mean, which is exact.
//
// Compiled once per instruction set.

#include "common/cpu/pages.h"

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "layernorm_ffn/cpu/dropout.inl"
#endif

namespace bigkern::layernorm_ffn::BIGKERN_ISA {
namespace {

// Lanes from n on become 0: sums must not see them.
inline vf first_n(vf x, int64_t n) {
  return n >= W ? x : select(lanes() < set1_int(int32_t(n)), x, zero());
}

// Calls f(j, n) for each vector of a row of N elements. n is W, and at compile time, but for the
// last: the functions above then test nothing.
struct Whole {
  constexpr operator int64_t() const { return W; }
};
template <class F>
inline void each_vector(int64_t N, const F& f) {
  int64_t j = 0;
  for (; j + W <= N; j += W) f(j, Whole{});
  if (j < N) f(j, N - j);
}

// K sums over a row: f(j, n, sums) adds the terms of a vector. They are carried over to the totals
// every kSpan vectors, since rounding errors of terms of one sign grow with the longest chain.
constexpr int64_t kSpan = 128;

template <int K>
struct RowSums {
  vf total[K];

  template <class F>
  RowSums(int64_t N, const F& f) {
    for (vf& t : total) t = zero();
    for (int64_t first = 0; first < N; first += kSpan * W) {
      vf sums[K];
      for (vf& sum : sums) sum = zero();
      each_vector(at_most(N - first, kSpan * W),
                  [&](int64_t j, auto n) BIGKERN_FN { f(first + j, n, sums); });
      for (int k = 0; k < K; ++k) total[k] += sums[k];
    }
  }

  float operator[](int k) const { return reduce_add(total[k]); }
};

struct RowStats {
  float mean, shift, rstd;
};

template <class T>
RowStats row_stats(const T* v, int64_t N, Norm norm, float eps) {
  float mean = 0.0f;
  if (norm == Norm::layer) {
    const RowSums<1> sum(
        N, [&](int64_t j, auto n, vf(&sums)[1]) BIGKERN_FN { sums[0] += load_upto(v + j, n); });
    mean = sum[0] / float(N);
  }
  const RowSums<2> sums(N, [&](int64_t j, auto n, vf(&sums)[2]) BIGKERN_FN {
    const vf d = first_n(load_upto(v + j, n) - mean, n);
    sums[0] += d;
    sums[1] = fma(d, d, sums[1]);
  });
  const float shift = norm == Norm::layer ? sums[0] / float(N) : 0.0f;
  const float variance = sums[1] / float(N) - shift * shift;
  // A NaN must stay one.
  return {mean, shift, 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + eps)};
}

// x^ of n <= W elements.
template <class T>
inline vf normalised(const T* v, int64_t n, const RowStats& stats) {
  return (load_upto(v, n) - stats.mean - stats.shift) * stats.rstd;
}

template <class T>
void normalise_row(const T* v, int64_t N, const RowStats& stats, const T* weight, const T* bias,
                   T* y) {
  each_vector(N, [&](int64_t j, auto n) BIGKERN_FN {
    const vf w = load_or(weight, j, n, 1.0f), b = load_or(bias, j, n, 0.0f);
    store_upto(y + j, fma(normalised(v + j, n, stats), w, b), n);
  });
}

// Rows of N that are worth a thread.
inline int64_t row_grain(int64_t N) { return 1 + 16384 / (N + 1); }

template <class T>
void norm_forward(const NormParams& p, const Parallel& parallel) {
  const int64_t N = p.N;
  const Drop drop(p.dropout, kOutput);
  const size_t bytes = size_t(p.M * p.N) * sizeof(T);
  prefer_large_pages(p.y, bytes);
  if (p.sum) prefer_large_pages(p.sum, bytes);
  parallel.for_range(0, p.M, row_grain(N), [&](int64_t begin, int64_t end) BIGKERN_FN {
    for (int64_t i = begin; i < end; ++i) {
      const T* v = static_cast<const T*>(p.x) + i * N;
      if (p.residual) {
        const T* residual = static_cast<const T*>(p.residual) + i * N;
        T* sum = static_cast<T*>(p.sum) + i * N;
        for (int64_t j = 0; j < N; j += W) {
          const vf x = drop(load_upto(v + j, N - j), i, j);
          store_upto(sum + j, x + load_upto(residual + j, N - j), N - j);
        }
        v = sum;
      }
      const RowStats stats = row_stats(v, N, p.norm, p.eps);
      normalise_row(v, N, stats, static_cast<const T*>(p.weight), static_cast<const T*>(p.bias),
                    static_cast<T*>(p.y) + i * N);
      if (p.mean) p.mean[i] = stats.mean + stats.shift;
      if (p.rstd) p.rstd[i] = stats.rstd;
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------

// Sums over rows are cut in this many blocks whatever the threads, so that results do not depend
// on them; a partial sum is no longer than 64 rows until M passes 16384. Partial sums are added in
// groups of 16: the rounding errors of rows that are all alike, as behind an average over pixels,
// point the same way, and grow with the length of the longest chain of additions.
inline int64_t row_sum_blocks(int64_t M) { return at_most((M + 63) / 64, 256); }
constexpr int64_t kSumGroup = 16;

// The sum of load(i) over [begin, end), in groups.
template <class Load>
inline vf grouped_sum(int64_t begin, int64_t end, const Load& load) {
  vf total = zero();
  for (int64_t first = begin; first < end; first += kSumGroup) {
    vf sum = zero();
    for (int64_t i = first; i < at_most(end, first + kSumGroup); ++i) sum += load(i);
    total += sum;
  }
  return total;
}

// out[j] = the sum of `blocks` partial sums; out may be null.
template <class T>
void add_partial_sums(const float* partial, int64_t blocks, int64_t stride, int64_t N, T* out,
                      const Parallel& parallel) {
  if (!out) return;
  parallel.for_range(
      0, (N + W - 1) / W, 1 + 4096 / (blocks + 1), [&](int64_t begin, int64_t end) BIGKERN_FN {
        for (int64_t j = begin * W; j < at_most(end * W, N); j += W) {
          const auto part = [&](int64_t b)
                                BIGKERN_FN { return load_upto(partial + b * stride + j, N - j); };
          store_upto(out + j, grouped_sum(0, blocks, part), N - j);
        }
      });
}

// out[j] += x, or = x where nothing is there yet; null out: not wanted.
inline void accumulate(float* out, int64_t j, vf x, int64_t n, bool first) {
  if (!out) return;
  store_upto(out + j, first ? x : x + load_upto(out + j, n), n);
}

// What the backward of one row reads and writes; G is the type of the arriving gradient.
template <class T, class G>
struct NormBackwardRow {
  const G* dy;
  const T* dsum;  // null ok
  const T* v;
  const T* weight;  // null ok
  float mean, rstd;
  T* ds;  // null ok
  T* dx;  // drop(ds), null ok

  // Row i of N; dweight and dbias are partial sums, null ok, with nothing in them yet if first.
  void run(int64_t i, int64_t N, Norm norm, const Drop& drop, float* dweight, float* dbias,
           bool first) const {
    const NormBackwardRow row = *this;  // which no store can change
    const RowSums<3> sums(N, [&](int64_t j, auto n, vf(&sums)[3]) BIGKERN_FN {
      const vf d = first_n(load_upto(row.v + j, n) - row.mean, n);
      const vf g = load_upto(row.dy + j, n) * load_or(row.weight, j, n, 1.0f);
      sums[0] += d;
      sums[1] += g;
      sums[2] = fma(g, d, sums[2]);
    });
    const bool layer = norm == Norm::layer;
    const float g_total = sums[1];
    const RowStats stats = {row.mean, layer ? sums[0] / float(N) : 0.0f, row.rstd};
    const float average_g = layer ? g_total / float(N) : 0.0f;
    const float average_gx = (sums[2] - stats.shift * g_total) * row.rstd / float(N);
    each_vector(N, [&](int64_t j, auto n) BIGKERN_FN {
      const vf x_hat = normalised(row.v + j, n, stats), dy = load_upto(row.dy + j, n);
      const vf g = dy * load_or(row.weight, j, n, 1.0f);
      const vf dv = (g - average_g - x_hat * average_gx) * row.rstd;
      const vf ds = dv + load_or(row.dsum, j, n, 0.0f);
      if (row.ds) store_upto(row.ds + j, ds, n);
      if (row.dx) store_upto(row.dx + j, drop(ds, i, j), n);
      accumulate(dweight, j, dy * x_hat, n, first);
      accumulate(dbias, j, dy, n, first);
    });
  }
};

// The backward of rows of any kind: make_row(i) names what belongs to row i. `partial` has room for
// row_sum_blocks(M) * 2 * N floats.
template <class T, class MakeRow>
void norm_backward_rows(int64_t M, int64_t N, Norm norm, const Drop& drop, T* dweight, T* dbias,
                        float* partial, const MakeRow& make_row, const Parallel& parallel) {
  const int64_t blocks = row_sum_blocks(M);
  parallel.for_range(0, blocks, 1, [&](int64_t begin, int64_t end) BIGKERN_FN {
    for (int64_t b = begin; b < end; ++b) {
      const Slice rows = slice_of(M, 1, b, blocks);
      float* sum_weight = dweight ? partial + b * 2 * N : nullptr;
      float* sum_bias = dbias ? partial + b * 2 * N + N : nullptr;
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        make_row(i).run(i, N, norm, drop, sum_weight, sum_bias, i == rows.begin);
      }
    }
  });
  add_partial_sums(partial, blocks, 2 * N, N, dweight, parallel);
  add_partial_sums(partial + N, blocks, 2 * N, N, dbias, parallel);
}

// dbias = the sum of the rows of x [M, N]. `partial` as above.
template <class T>
void sum_rows(const T* x, int64_t M, int64_t N, T* out, float* partial, const Parallel& parallel) {
  if (!out) return;
  const int64_t blocks = row_sum_blocks(M);
  parallel.for_range(0, blocks, 1, [&](int64_t begin, int64_t end) BIGKERN_FN {
    for (int64_t b = begin; b < end; ++b) {
      const Slice rows = slice_of(M, 1, b, blocks);
      for (int64_t j = 0; j < N; j += W) {
        const auto value = [&](int64_t i) BIGKERN_FN { return load_upto(x + i * N + j, N - j); };
        store_upto(partial + b * N + j, grouped_sum(rows.begin, rows.end, value), N - j);
      }
    }
  });
  add_partial_sums(partial, blocks, N, N, out, parallel);
}

template <class T>
void norm_backward(const NormBackwardParams& p, const Parallel& parallel) {
  const T* dsum = static_cast<const T*>(p.dsum);
  const size_t bytes = size_t(p.M * p.N) * sizeof(T);
  prefer_large_pages(p.ds, bytes);
  if (p.dx) prefer_large_pages(p.dx, bytes);
  const auto make_row = [&](int64_t i) BIGKERN_FN {
    const int64_t at = i * p.N;
    return NormBackwardRow<T, T>{static_cast<const T*>(p.dy) + at,
                                 dsum ? dsum + at : nullptr,
                                 static_cast<const T*>(p.s) + at,
                                 static_cast<const T*>(p.weight),
                                 p.mean ? p.mean[i] : 0.0f,
                                 p.rstd[i],
                                 p.ds ? static_cast<T*>(p.ds) + at : nullptr,
                                 p.dx ? static_cast<T*>(p.dx) + at : nullptr};
  };
  norm_backward_rows(p.M, p.N, p.norm, Drop(p.dropout, kOutput), static_cast<T*>(p.dweight),
                     static_cast<T*>(p.dbias), static_cast<float*>(p.workspace), make_row,
                     parallel);
}

}  // namespace
}  // namespace bigkern::layernorm_ffn::BIGKERN_ISA
