// The forward pass for a few queries against many keys, as when text is generated one token at a
// time: a tile's 64 lanes would be mostly empty, so vectors run along the head dimension here.
// Compiled once per instruction set.
//
//   for each block of keys     x [rows, keys] = q k^T     W keys at once, summed by a transposition
//   in a part of the keys:     p = e^(x - max)            along the row
//                              o [rows, Dv] += p v
//
// Where there are fewer heads than threads, the keys of a head are cut into parts; their results
// are put together in a second pass, always in the same order (Flash-Decoding; Dao et al., 2023).

#include <algorithm>

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "attention/cpu/scores.inl"
#endif

namespace bigkern::attention::BIGKERN_ISA {
namespace {

// ---- scores -------------------------------------------------------------------------------------

// sums[i] += the products of q [V W] and row i from column d on, each row at one go: memory is read
// in order.
template <int V, class T>
ATTENTION_INLINE void add_products(const float* q, const T* const* rows, int64_t d, vf (&sums)[W]) {
  vf qd[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) qd[v] = load(q + d + v * W);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[i] = fma(load(rows[i] + d + v * W), qd[v], sums[i]);
  }
}

// Scores of the W keys at `rows`: scale q k^T, one lane a key.
template <class T>
vf dot_keys(const float* q, const T* const* rows, int64_t D, float scale) {
  vf sums[W] = {};
  int64_t d = 0;
  for (; d + 4 * W <= D; d += 4 * W) add_products<4>(q, rows, d, sums);
  for (; d + W <= D; d += W) add_products<1>(q, rows, d, sums);
  if (d < D) {
    const vf qd = load(q + d);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) sums[i] = fma(load_n(rows[i] + d, D - d), qd, sums[i]);
  }
  transpose(sums);
  vf x = sums[0];
#pragma GCC unroll 16
  for (int i = 1; i < W; ++i) x += sums[i];
  return x * scale;
}

// The scores of a backward block [keys, 64] by the same sums: lse then fits them to the last bit.
inline void dot_rows(const Shape& s, const QueryTile& tile, const KeyBlock& block,
                     const Left<float>& k, const float* q, float* x) {
  std::fill_n(x, block.keys * kLanes, 0.0f);
  for (int64_t r = 0; r < tile.rows; ++r) {
    for (int64_t j = 0; j < block.keys; j += W) {
      const float* rows[W];
      for (int64_t i = 0; i < W; ++i) rows[i] = k.data + at_most(j + i, block.keys - 1) * k.row;
      const vf sums = dot_keys(q + r * padded(s.D), rows, s.D, s.scale);
      for (int64_t i = 0; i < at_most(block.keys - j, W); ++i) x[(j + i) * kLanes + r] = sums[i];
    }
  }
}

// Where the rows of k or v lie that belong to a block of keys; behind the last key, the last again.
template <class T>
struct BlockRows {
  const T* row[kKeys];

  BlockRows(const Decode& call, const View<const void*>& x, const QueryTile& tile, int64_t first,
            int64_t n) {
    for (int64_t j = 0; j < n;) {
      const int64_t begin = j, end = std::min(n, array_end(call.pages, first + j) - first);
      const T* rows = key_at<T>(call, x, tile, first + j);
      for (; j < end; ++j) row[j] = rows + (j - begin) * x.row;
    }
    for (int64_t j = n; j < padded(n); ++j) row[j] = row[n - 1];
  }
};

// Asks for rows of n elements that will soon be read.
template <class T>
void prefetch_rows(const T* const* rows, int64_t count, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t d = 0; d < n; d += kLine) __builtin_prefetch(rows[r] + d, 0, 2);
  }
}

// What a general shape does to a row's dot products x with n keys from `first` on.
template <class T>
void restrict_row(const Shape& s, const QueryTile& tile, const LaneRules& rules, int64_t r,
                  int64_t first, int64_t n, float* x) {
  const T* bias = s.bias.data ? entries_at<const T>(s.bias, tile.batch, tile.row[r]) : nullptr;
  const bool* mask =
      s.mask.data ? entries_at<const bool>(s.mask, tile.batch, tile.row[r]) : nullptr;
  for (int64_t j = 0; j < n; j += W) {
    const vi key = lanes() + static_cast<int32_t>(first + j);
    vf score = load(x + j);
    if (s.softcap != 0) score = s.softcap * tanh(score * (1.0f / s.softcap));
    if (bias) {
      score += load_strided(bias + (first + j) * s.bias.column, s.bias.column, n - j);
    }
    if (s.slopes.data) {
      score -= rules.slope[r] * abs(__builtin_convertvector(rules.place[r] - key, vf));
    }
    if (mask) {
      const vf allowed = load_strided(mask + (first + j) * s.mask.column, s.mask.column, n - j);
      score = select(allowed != 0.0f, score, set1(-__builtin_inff()));
    }
    store(x + j, score);
  }
}

// -inf outside of the row's window, and behind the last key.
inline void forbid_unseen(const Horizon& horizon, int64_t r, int64_t first, int64_t n, float* x) {
  const int64_t begin = std::clamp<int64_t>(horizon.first[r] - first, 0, n);
  const int64_t end = std::clamp<int64_t>(horizon.last[r] + 1 - first, 0, n);
  std::fill(x, x + begin, -__builtin_inff());
  std::fill(x + end, x + padded(n), -__builtin_inff());
}

// ---- one row ------------------------------------------------------------------------------------

// o [Dv] = o * rescale + p [n] v [n, Dv], from column d on.
template <int V, class T>
void add_values(const float* p, const BlockRows<T>& v, int64_t n, int64_t d, int64_t Dv,
                float rescale, float* o) {
  for (; d < Dv; d += V * W) {
    if (V > 1 && Dv - d < V * W) return add_values<1>(p, v, n, d, Dv, rescale, o);
    vf sum[V];
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) sum[i] = load(o + d + i * W) * rescale;
    for (int64_t j = 0; j < n; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) {
        sum[i] = fma(set1(p[j]), load_some(v.row[j] + d + i * W, Dv - d - i * W), sum[i]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) store(o + d + i * W, sum[i]);
  }
}

// Scores x [n] to weights, in place; returns what o is to be multiplied by.
inline float soften_row(int64_t n, float* x, const RowResult& row) {
  vf highest = set1(*row.max);
  for (int64_t j = 0; j < n; j += W) highest = max(highest, load(x + j));
  const float max = reduce_max(highest);
  const vf shift = set1(max == -__builtin_inff() ? 0.0f : max);  // nothing seen yet: p = e^-inf
  vf sum = zero();
  for (int64_t j = 0; j < n; j += W) {
    const vf p = exp_flush(load(x + j) - shift);
    sum += p;
    store(x + j, p);
  }
  const float rescale = exp_flush(set1(*row.max) - shift)[0];
  *row.max = max;
  *row.sum = *row.sum * rescale + reduce_add(sum);
  return rescale;
}

// All rows of a tile against the keys begin .. end.
template <class T>
void attend_rows(const Decode& call, const QueryTile& tile, const Horizon& horizon, int64_t begin,
                 int64_t end, const RowsScratch& scratch, float* results) {
  const Shape& s = call.shape;
  const LaneRules rules(s, tile);
  const TileRows<const T> q = tile_rows<const T>(call.q, tile);
  for (int64_t r = 0; r < tile.rows; ++r) {
    for (int64_t d = 0; d < s.D; d += W) {
      store(scratch.q + r * padded(s.D) + d, load_some(q.row[r] + d, s.D - d));
    }
    const RowResult row(s, results, r);
    *row.max = -__builtin_inff();
    *row.sum = 0;
    std::fill_n(row.o, padded(s.Dv), 0.0f);
  }
  float* x = scratch.x;
  for (int64_t first = begin; first < end; first += kKeys) {
    const int64_t n = at_most(end - first, kKeys);
    const BlockRows<T> k(call, call.k, tile, first, n), v(call, call.v, tile, first, n);
    const int64_t ahead = at_most(end - first - n, kKeys);  // the next block's
    const BlockRows<T> next_k(call, call.k, tile, first + n, ahead);
    const BlockRows<T> next_v(call, call.v, tile, first + n, ahead);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const float* qr = scratch.q + r * padded(s.D);
      for (int64_t j = 0; j < n; j += W) {
        store(x + j, dot_keys(qr, k.row + j, s.D, s.scale));
        const int64_t soon = r == 0 ? std::clamp<int64_t>(ahead - j, 0, W) : 0;
        prefetch_rows(next_k.row + j, soon, s.D);
        prefetch_rows(next_v.row + j, soon, s.Dv);
      }
      if (s.general()) restrict_row<T>(s, tile, rules, r, first, n, x);
      forbid_unseen(horizon, r, first, n, x);
      const RowResult row(s, results, r);
      const float rescale = soften_row(n, x, row);
      for (int64_t j = 0; s.dropout.active() && j < n; j += W) {
        const vu key = vu(lanes() + static_cast<int32_t>(first + j));
        store(x + j, load(x + j) * draw(s.dropout, vu{} + rules.a[r], vu{} + rules.c[r], key));
      }
      add_values<4>(x, v, n, 0, s.Dv, rescale, row.o);
    }
  }
}

// ---- putting parts together ---------------------------------------------------------------------

// o and lse of a tile's rows from the results over parts of their keys, `stride` floats apart. A
// sink is a key that all see and that has no value.
template <class T>
void join_parts(const Decode& call, const QueryTile& tile, float* results, int64_t parts,
                int64_t stride) {
  const Shape& s = call.shape;
  const TileRows<T> o = tile_rows<T>(call.o, tile);
  const float infinity = __builtin_inff();
  for (int64_t r = 0; r < tile.rows; ++r) {
    const RowResult first(s, results, r);
    const float sink = s.sinks.data ? per_head(s.sinks, tile, r) : -infinity;
    float max = sink;
    for (int64_t i = 0; i < parts; ++i) max = std::max(max, first.max[i * stride]);
    const vf shift = set1(max == -infinity ? 0.0f : max);
    float sum = exp_flush(set1(sink) - shift)[0];
    for (int64_t i = 0; i < parts; ++i) {
      const float weight = exp_flush(set1(first.max[i * stride]) - shift)[0];
      first.max[i * stride] = weight;
      sum += weight * first.sum[i * stride];
    }
    for (int64_t d = 0; d < s.Dv; d += W) {
      vf x = zero();
      for (int64_t i = 0; i < parts; ++i) {
        x = fma(set1(first.max[i * stride]), load(first.o + i * stride + d), x);
      }
      store_some(o.row[r] + d, sum == 0 ? zero() : x / sum, s.Dv - d);
    }
    *statistic_at(call.lse, tile, r) = max + log(set1(sum))[0];
  }
}

}  // namespace
}  // namespace bigkern::attention::BIGKERN_ISA
