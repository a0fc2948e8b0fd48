// Flash attention's forward pass on one thread's tile of queries: online softmax over blocks of
// keys (Dao et al., 2022; Milakov and Gimelshein, 2018). Compiled once per instruction set.
//
//   q^T [D, 64] stays in L1      for each block of keys (a key is a row, a query a lane):
//                                  x   [keys, 64] = k q^T                     k from where it lies
//                                  max, p = e^(x - max), sum                  lane by lane
//   o^T [Dv, 64] stays in L1       o^T = o^T e^(old max - max) + v^T p        v from where it lies

namespace bigkern::attention::BIGKERN_ISA {
namespace {

// Scores to weights in place, p = e^(x - max): rows of floats, or of pairs of neighbouring keys.
template <class T>
void online_softmax(const KeyBlock& block, int64_t lanes, const ForwardScratch& f) {
  const float infinity = __builtin_inff();
  for (int64_t lane = block.lane; lane < lanes; lane += W) {
    float* x = f.x + lane;
    const vf before = load(f.max + lane);
    vf highest = before;
    for (int64_t j = 0; j < block.keys; ++j) highest = max(highest, load(x + j * kLanes));
    const vf shift = select(highest == -infinity, zero(), highest);  // nothing seen yet: p = e^-inf
    const vf rescale = exp_flush(before - shift);
    vf sum = load(f.sum + lane) * rescale;
    if constexpr (paired<T>) {
      for (int64_t j = 0; j < block.keys; j += 2) {
        const vf even = exp_flush(load(x + j * kLanes) - shift);
        const vf odd = j + 1 < block.keys ? exp_flush(load(x + (j + 1) * kLanes) - shift) : zero();
        sum += even + odd;
        store(x + j / 2 * kLanes, pair_across(even, odd));
      }
    } else {
      for (int64_t j = 0; j < block.keys; ++j) {
        const vf p = exp_flush(load(x + j * kLanes) - shift);
        sum += p;
        store(x + j * kLanes, p);
      }
    }
    store(f.max + lane, highest);
    store(f.sum + lane, sum);
    store(f.rescale + lane, rescale);
  }
}

// o and lse of a tile from the sums; a lane that saw nothing has sum 0 and max -inf.
template <class T>
void finish_tile(const Forward& call, const QueryTile& tile, const ForwardScratch& f) {
  const Shape& s = call.shape;
  for (int64_t lane = 0; lane < kLanes; lane += W) {
    const vf sum = load(f.sum + lane);
    store(f.rescale + lane, select(sum == 0.0f, zero(), 1.0f / sum));
    store(f.max + lane, load(f.max + lane) + log(sum));
  }
  unpack_lanes(f.o, f.rescale, s.Dv, TileRows<T>(call.o, s, tile));
  for (int64_t lane = 0; lane < tile.rows; ++lane) {
    const Row row = row_of(s, tile, lane);
    call.lse.data[(tile.batch * s.Hq + row.head) * s.Sq + row.index] = f.max[lane];
  }
}

template <class T>
void attend(const Forward& call, const QueryTile& tile, const ForwardScratch& f) {
  const Shape& s = call.shape;
  const int64_t lanes = padded(tile.rows);
  pack_lanes(TileRows<const T>(call.q, s, tile), s.D, f.q);
  std::fill_n(f.max, kLanes, -__builtin_inff());
  std::fill_n(f.sum, kLanes, 0.0f);
  std::fill_n(f.o, padded(s.Dv) * kLanes, 0.0f);

  const Horizon horizon(s, tile);
  for (int64_t key = 0; key < horizon.any;) {
    const KeyBlock block = horizon.block(key);
    const T* keys = row_at<T>(call.k, tile.batch, {tile.kv_head, key});
    const T* values = row_at<T>(call.v, tile.batch, {tile.kv_head, key});
    const Left<Element<T>> k = key_rows(keys, call.k.row, block.keys, s.D, f.k);
    dot_lanes<T>(s, block, lanes, k, f.q, f.x);
    restrict_scores<T>(s, tile, horizon, block, lanes, f.x);
    online_softmax<T>(block, lanes, f);
    const Left<Element<T>> v = key_columns(values, call.v.row, block.keys, s.Dv, f.v);
    multiply(Product<Element<T>>{s.Dv, words_of<T>(block.keys), v.data, v.row, v.column,
                                 reinterpret_cast<const Element<T>*>(f.x), kLanes, f.o, kLanes,
                                 1.0f, true, f.rescale},
             block.lane, lanes);
    key += block.keys;
  }
  finish_tile<T>(call, tile, f);
}

template <class T>
void forward_tiles(const Forward& call, const Parallel& parallel) {
  const Shape& s = call.shape;
  const int64_t rows = rows_of_group(s);
  const int64_t step = rows_per_tile(s, parallel.threads);
  const int64_t tiles = ceil_div(rows, step);
  char* workspace = static_cast<char*>(call.workspace);
  const size_t bytes = scratch_bytes<ForwardScratch>(s);
  run_tasks(s.B * s.Hkv * tiles, parallel, [&](int64_t task, int worker) BIGKERN_FN {
    Arena arena(workspace + bytes * static_cast<size_t>(worker));
    const ForwardScratch scratch(arena, s);
    const int64_t head = task / tiles;
    const int64_t first = (tiles - 1 - task % tiles) * step;  // causal: the longest first
    attend<T>(call, {head / s.Hkv, head % s.Hkv, first, at_most(rows - first, step)}, scratch);
  });
}

template <class T>
void forward_all(const Forward& call, const Parallel& parallel) {
  decodes(call.shape) ? decode_all<T>(call, parallel) : forward_tiles<T>(call, parallel);
}

}  // namespace

void forward(const Forward& call, const Parallel& parallel) {
  switch (call.shape.dtype) {
    case Dtype::f32:
      return forward_all<float>(call, parallel);
    case Dtype::bf16:
      return forward_all<bf16>(call, parallel);
    case Dtype::f16:
      return forward_all<fp16>(call, parallel);
  }
}

}  // namespace bigkern::attention::BIGKERN_ISA
