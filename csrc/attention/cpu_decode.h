// The forward pass for a few queries against many keys, as when text is generated one token at a
// time: a tile's 64 lanes would be mostly empty, so vectors run along the head dimension here.
// Compiled once per instruction set.
//
//   for each block of keys     x [rows, keys] = q k^T     W keys at once, summed by a transposition
//   in a span of the keys:     p = e^(x - max)            along the row
//                              o [rows, Dv] += p v
//
// Where there are fewer heads than threads, the keys of a head are cut into spans; their results
// are put together in a second pass, always in the same order (Flash-Decoding; Dao et al., 2023).

namespace bigkern::attention::BIGKERN_ISA {
namespace {

// Scores of the W keys at `rows`: scale q k^T, one lane a key.
template <class T>
vf dot_keys(const float* q, const T* const (&rows)[W], int64_t D, float scale) {
  vf sums[W] = {};
  int64_t d = 0;
  for (; d + W <= D; d += W) {
    const vf qd = load(q + d);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) sums[i] = fma(load(rows[i] + d), qd, sums[i]);
  }
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

// Adds the bias to a row's scores x [n], keys from `first` on; -inf where mask or causal forbid.
template <class T>
void restrict_row(const Shape& s, const QueryTile& tile, int64_t r, int64_t first, int64_t n,
                  int64_t last, float* x) {
  const Row row = row_of(s, tile, r);
  if (s.bias.data != nullptr) {
    const T* bias = row_at<T>(s.bias, tile.batch, row) + first * s.bias.column;
    for (int64_t j = 0; j < n; ++j) x[j] += to_float(bias[j * s.bias.column]);
  }
  if (s.mask.data != nullptr) {
    const bool* mask = row_at<bool>(s.mask, tile.batch, row) + first * s.mask.column;
    for (int64_t j = 0; j < n; ++j) x[j] = mask[j * s.mask.column] ? x[j] : -__builtin_inff();
  }
  for (int64_t j = std::max<int64_t>(0, last + 1 - first); j < n; ++j) x[j] = -__builtin_inff();
}

// o [Dv] = o * rescale + p [n] v [n, Dv]
template <int V, class T>
void add_values(const float* p, const T* values, int64_t stride, int64_t n, int64_t Dv,
                float rescale, float* o) {
  for (; Dv > 0; Dv -= V * W, values += V * W, o += V * W) {
    if (V > 1 && Dv < V * W) return add_values<1>(p, values, stride, n, Dv, rescale, o);
    vf sum[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[v] = load(o + v * W) * rescale;
    for (int64_t j = 0; j < n; ++j) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        sum[v] = fma(set1(p[j]), load_some(values + j * stride + v * W, Dv - v * W), sum[v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(o + v * W, sum[v]);
  }
}

// One row against one block of keys.
template <class T>
void decode_block(const Forward& call, const QueryTile& tile, int64_t r, int64_t first, int64_t n,
                  int64_t last, const float* q, float* x, const DecodeRow& row) {
  const Shape& s = call.shape;
  const float infinity = __builtin_inff();
  const T* keys = row_at<T>(call.k, tile.batch, {tile.kv_head, first});
  for (int64_t j = 0; j < n; j += W) {
    const T* rows[W];
    for (int64_t i = 0; i < W; ++i) rows[i] = keys + at_most(j + i, n - 1) * call.k.row;
    store(x + j, dot_keys(q, rows, s.D, s.scale));
  }
  restrict_row<T>(s, tile, r, first, n, last, x);
  std::fill(x + n, x + padded(n), -infinity);

  vf highest = set1(*row.max);
  for (int64_t j = 0; j < n; j += W) highest = max(highest, load(x + j));
  const float max = reduce_max(highest);
  const vf shift = set1(max == -infinity ? 0.0f : max);  // nothing seen yet: p = e^-inf
  vf sum = zero();
  for (int64_t j = 0; j < n; j += W) {
    const vf p = exp_flush(load(x + j) - shift);
    sum += p;
    store(x + j, p);
  }
  const float rescale = exp_flush(set1(*row.max) - shift)[0];
  *row.max = max;
  *row.sum = *row.sum * rescale + reduce_add(sum);
  add_values<4>(x, row_at<T>(call.v, tile.batch, {tile.kv_head, first}), call.v.row, n, s.Dv,
                rescale, row.o);
}

// All rows of a key head against the keys begin .. end.
template <class T>
void decode_span(const Forward& call, const QueryTile& tile, int64_t begin, int64_t end,
                 const DecodeScratch& scratch, float* results) {
  const Shape& s = call.shape;
  const TileRows<const T> q(call.q, s, tile);
  for (int64_t r = 0; r < tile.rows; ++r) {
    for (int64_t d = 0; d < s.D; d += W) {
      store(scratch.q + r * padded(s.D) + d, load_some(q.row[r] + d, s.D - d));
    }
    const DecodeRow row(s, results, r);
    *row.max = -__builtin_inff();
    *row.sum = 0;
    std::fill_n(row.o, padded(s.Dv), 0.0f);
  }
  const Horizon horizon(s, tile);
  for (int64_t first = begin; first < std::min(end, horizon.any); first += kKeys) {
    const int64_t n = std::min({kKeys, end - first, horizon.any - first});
    for (int64_t r = 0; r < tile.rows; ++r) {
      decode_block<T>(call, tile, r, first, n, horizon.last[r], scratch.q + r * padded(s.D),
                      scratch.x, DecodeRow(s, results, r));
    }
  }
}

// o and lse of a key head's rows from the results of its spans.
template <class T>
void join_spans(const Forward& call, const QueryTile& tile, float* results, int64_t spans) {
  const Shape& s = call.shape;
  const TileRows<T> o(call.o, s, tile);
  const float infinity = __builtin_inff();
  for (int64_t r = 0; r < tile.rows; ++r) {
    const DecodeRow first(s, results, r);
    const int64_t stride = tile.rows * DecodeRow::floats(s);
    float max = -infinity, sum = 0;
    for (int64_t i = 0; i < spans; ++i) max = std::max(max, first.max[i * stride]);
    const vf shift = set1(max == -infinity ? 0.0f : max);
    for (int64_t i = 0; i < spans; ++i) {
      const float weight = exp_flush(set1(first.max[i * stride]) - shift)[0];
      first.max[i * stride] = weight;
      sum += weight * first.sum[i * stride];
    }
    for (int64_t d = 0; d < s.Dv; d += W) {
      vf x = zero();
      for (int64_t i = 0; i < spans; ++i) {
        x = fma(set1(first.max[i * stride]), load(first.o + i * stride + d), x);
      }
      store_some(o.row[r] + d, sum == 0 ? zero() : x / sum, s.Dv - d);
    }
    const Row row = row_of(s, tile, r);
    call.lse.data[(tile.batch * s.Hq + row.head) * s.Sq + row.index] = max + log(set1(sum))[0];
  }
}

template <class T>
void decode_all(const Forward& call, const Parallel& parallel) {
  const Shape& s = call.shape;
  const int64_t heads = s.B * s.Hkv, rows = rows_of_group(s),
                spans = decode_spans(s, parallel.threads);
  const int64_t size = rows * DecodeRow::floats(s);
  const size_t bytes = scratch_bytes<DecodeScratch>(s);
  char* workspace = static_cast<char*>(call.workspace);
  float* all_results =
      reinterpret_cast<float*>(workspace + bytes * static_cast<size_t>(parallel.threads));
  const auto tile_of = [&](int64_t head) { return QueryTile{head / s.Hkv, head % s.Hkv, 0, rows}; };

  run_tasks(heads * spans, parallel, [&](int64_t task, int worker) BIGKERN_FN {
    Arena arena(workspace + bytes * static_cast<size_t>(worker));
    const DecodeScratch scratch(arena, s);
    const Slice keys = slice_of(s.Sk, kKeys, task % spans, spans);
    float* results = all_results + (spans == 1 ? worker : task) * size;
    decode_span<T>(call, tile_of(task / spans), keys.begin, keys.end, scratch, results);
    if (spans == 1) join_spans<T>(call, tile_of(task), results, 1);
  });
  if (spans == 1) return;
  for (int64_t head = 0; head < heads; ++head) {
    join_spans<T>(call, tile_of(head), all_results + head * spans * size, spans);
  }
}

}  // namespace
}  // namespace bigkern::attention::BIGKERN_ISA
