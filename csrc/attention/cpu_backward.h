// Flash attention's backward pass on one thread's tile of queries: the scores again, then the four
// products that lead to dq, dk and dv. Compiled once per instruction set.
//
//   for each block of keys (a key is a row, a query a lane):
//     p  [keys, 64] = e^(k q^T - lse)            dv [keys, Dv] += p  dout     in the workspace
//     ds [keys, 64] = p (v dout^T - delta)       dk [keys, D]  += ds q        in the workspace
//                                                dq^T [D, 64]  += k^T ds      stays in L1
//
// delta = rowsum(dout o). A task goes through all tiles of a key head, or through every parts-th of
// them: then the parts' sums are added in a second pass, always in the same order, without atomics.

namespace bigkern::attention::BIGKERN_ISA {
namespace {

// dk [Sk, padded(D)] and dv [Sk, padded(Dv)] of one task, in floats.
struct KeySums {
  float *dk, *dv;

  KeySums(const Shape& s, float* sums) : dk(sums), dv(sums + s.Sk * padded(s.D)) {}
};

// What the lanes bring: q and dout both ways, lse, delta.
template <class T>
void load_lanes(const Backward& call, const QueryTile& tile, const BackwardScratch& f) {
  const Shape& s = call.shape;
  const TileRows<const T> q(call.q, s, tile), dout(call.dout, s, tile), o(call.o, s, tile);
  pack_lanes(q, s.D, f.q);
  pack_lanes(dout, s.Dv, f.dout);
  pack_lane_rows(q, s.D, f.q_rows);
  pack_lane_rows(dout, s.Dv, f.dout_rows);
  std::fill_n(f.dq, padded(s.D) * kLanes, 0.0f);
  std::fill_n(f.lse, kLanes, __builtin_inff());  // p = 0 in lanes without a row
  std::fill_n(f.delta, kLanes, 0.0f);
  for (int64_t lane = 0; lane < tile.rows; ++lane) {
    const Row row = row_of(s, tile, lane);
    const float lse = call.lse.data[(tile.batch * s.Hq + row.head) * s.Sq + row.index];
    f.lse[lane] = lse == -__builtin_inff() ? 0.0f : lse;  // and where nothing was seen
    vf delta = zero();
    for (int64_t d = 0; d < s.Dv; d += W) {
      delta =
          fma(load_some(dout.row[lane] + d, s.Dv - d), load_some(o.row[lane] + d, s.Dv - d), delta);
    }
    f.delta[lane] = reduce_add(delta);
  }
}

// p = e^(x - lse) and ds = p (dp - delta), in place of x and dp. With pairs both become rows of
// bf16, and ds is also kept as pairs of neighbouring keys.
template <class T>
void weigh(const KeyBlock& block, int64_t lanes, const BackwardScratch& f) {
  for (int64_t lane = block.lane; lane < lanes; lane += W) {
    const vf lse = load(f.lse + lane), delta = load(f.delta + lane);
    vf even = zero();
    for (int64_t j = 0; j < block.keys; ++j) {
      float* x = f.p + j * kLanes;
      float* dp = f.ds + j * kLanes;
      const vf p = exp_flush(load(x + lane) - lse);
      const vf ds = p * (load(dp + lane) - delta);
      if constexpr (paired<T>) {
        store(reinterpret_cast<bf16*>(x) + lane, p);
        store(reinterpret_cast<bf16*>(dp) + lane, ds);
        if (j % 2 == 0) even = ds;
        const bool last = j + 1 == block.keys;
        if (j % 2 == 1 || last) {
          store(f.ds_pairs + j / 2 * kLanes + lane, pair_across(even, j % 2 == 1 ? ds : zero()));
        }
      } else {
        store(x + lane, p);
        store(dp + lane, ds);
      }
    }
  }
}

// sums [keys, padded(D)] += p [keys, lanes] x [lanes, padded(D)]
template <class T>
void add_over_lanes(const KeyBlock& block, int64_t lanes, const float* p, const float* x, int64_t D,
                    float* sums) {
  using E = Element<T>;
  const int64_t row = padded(D), first = words_of<T>(block.lane);
  multiply(Product<E>{block.keys, words_of<T>(lanes - block.lane),
                      reinterpret_cast<const E*>(p) + first, kLanes, 1,
                      reinterpret_cast<const E*>(x) + first * row, row, sums, row, 1.0f, true},
           0, row);
}

template <class T>
void backpropagate(const Backward& call, const QueryTile& tile, const BackwardScratch& f,
                   const KeySums& sums) {
  using E = Element<T>;
  const Shape& s = call.shape;
  const int64_t lanes = padded(tile.rows);
  load_lanes<T>(call, tile, f);

  const Horizon horizon(s, tile);
  for (int64_t key = 0; key < horizon.any;) {
    const KeyBlock block = horizon.block(key);
    const T* keys = row_at<T>(call.k, tile.batch, {tile.kv_head, key});
    const T* values = row_at<T>(call.v, tile.batch, {tile.kv_head, key});
    const Left<E> k = key_rows(keys, call.k.row, block.keys, s.D, f.k);
    if constexpr (paired<T>) {
      dot_lanes<T>(s, block, lanes, k, f.q, f.p);
    } else {
      decodes(s) ? dot_rows(s, tile, block, k, f.q_rows, f.p)
                 : dot_lanes<T>(s, block, lanes, k, f.q, f.p);
    }
    restrict_scores<T>(s, tile, horizon, block, lanes, f.p);
    const Left<E> v = key_rows(values, call.v.row, block.keys, s.Dv, f.v);
    multiply(Product<E>{block.keys, words_of<T>(s.Dv), v.data, v.row, v.column,
                        reinterpret_cast<const E*>(f.dout), kLanes, f.ds, kLanes},
             block.lane, lanes);
    weigh<T>(block, lanes, f);
    add_over_lanes<T>(block, lanes, f.p, f.dout_rows, s.Dv, sums.dv + key * padded(s.Dv));
    add_over_lanes<T>(block, lanes, f.ds, f.q_rows, s.D, sums.dk + key * padded(s.D));
    const Left<E> kt = paired<T> ? key_columns(keys, call.k.row, block.keys, s.D, f.k_columns)
                                 : Left<E>{k.data, k.column, k.row};
    multiply(Product<E>{s.D, words_of<T>(block.keys), kt.data, kt.row, kt.column,
                        reinterpret_cast<const E*>(paired<T> ? f.ds_pairs : f.ds), kLanes, f.dq,
                        kLanes, 1.0f, true},
             block.lane, lanes);
    key += block.keys;
  }
  std::fill_n(f.delta, kLanes, s.scale);
  unpack_lanes(f.dq, f.delta, s.D, TileRows<T>(call.dq, s, tile));
}

// Rows of keys: out [.., D] = scale * the sum of `parts` arrays, `stride` floats apart.
template <class T>
void store_sums(const float* sums, int64_t parts, int64_t stride, int64_t D, float scale, T* out) {
  for (int64_t d = 0; d < D; d += W) {
    vf x = load(sums + d);
    for (int64_t part = 1; part < parts; ++part) x += load(sums + part * stride + d);
    store_some(out + d, x * scale, D - d);
  }
}

template <class T>
void store_keys(const Backward& call, int64_t head, int64_t begin, int64_t end, float* sums,
                int64_t parts) {
  const Shape& s = call.shape;
  const KeySums first(s, sums);
  const int64_t stride = sums_floats(s), b = head / s.Hkv, h = head % s.Hkv;
  for (int64_t key = begin; key < end; ++key) {
    store_sums(first.dk + key * padded(s.D), parts, stride, s.D, s.scale,
               row_at<T>(call.dk, b, {h, key}));
    store_sums(first.dv + key * padded(s.Dv), parts, stride, s.Dv, 1.0f,
               row_at<T>(call.dv, b, {h, key}));
  }
}

template <class T>
void backward_all(const Backward& call, const Parallel& parallel) {
  const Shape& s = call.shape;
  const int64_t rows = rows_of_group(s), tiles = ceil_div(rows, kLanes), heads = s.B * s.Hkv;
  const int64_t parts = backward_parts(s, parallel.threads), sums_size = sums_floats(s);
  const size_t bytes = scratch_bytes<BackwardScratch>(s);
  char* workspace = static_cast<char*>(call.workspace);
  float* all_sums =
      reinterpret_cast<float*>(workspace + bytes * static_cast<size_t>(parallel.threads));

  run_tasks(heads * parts, parallel, [&](int64_t task, int worker) BIGKERN_FN {
    Arena arena(workspace + bytes * static_cast<size_t>(worker));
    const BackwardScratch scratch(arena, s);
    const int64_t head = task / parts;
    float* sums = all_sums + (parts == 1 ? worker : task) * sums_size;
    std::fill_n(sums, sums_size, 0.0f);
    for (int64_t tile = task % parts; tile < tiles; tile += parts) {
      const int64_t first = tile * kLanes;
      backpropagate<T>(call, {head / s.Hkv, head % s.Hkv, first, at_most(rows - first, kLanes)},
                       scratch, KeySums(s, sums));
    }
    if (parts == 1) store_keys<T>(call, head, 0, s.Sk, sums, 1);
  });
  if (parts == 1) return;

  parallel.for_range(0, heads * s.Sk, 64, [&](int64_t begin, int64_t end) BIGKERN_FN {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t head = at / s.Sk, key = at % s.Sk;
      store_keys<T>(call, head, key, key + 1, all_sums + head * parts * sums_size, parts);
    }
  });
}

}  // namespace

void backward(const Backward& call, const Parallel& parallel) {
  switch (call.shape.dtype) {
    case Dtype::f32:
      return backward_all<float>(call, parallel);
    case Dtype::bf16:
      return backward_all<bf16>(call, parallel);
    case Dtype::f16:
      return backward_all<fp16>(call, parallel);
  }
}

}  // namespace bigkern::attention::BIGKERN_ISA
