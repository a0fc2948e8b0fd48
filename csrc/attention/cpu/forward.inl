// Flash attention's forward pass on one thread's tile of queries: online softmax over blocks of
// keys (Dao et al., 2022; Milakov and Gimelshein, 2018). Compiled once per instruction set.
//
//   q^T [D, 64] stays in L1      for each block of keys (a key is a row, a query a lane):
//                                  x   [keys, 64] = k q^T                     k from where it lies
//                                  max, p = e^(x - max), sum                  lane by lane
//   o^T [Dv, 64] stays in L1       o^T = o^T e^(old max - max) + v^T p        v from where it lies

#include <algorithm>

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "attention/cpu/decode.inl"
#endif

namespace bigkern::attention::BIGKERN_ISA {
namespace {

// Scores to weights in place, p = e^(x - max): rows of floats, or of pairs of neighbouring keys.
// What dropout takes away counts in the sum.
template <class T, bool DROPPED>
void online_softmax(const KeyBlock& block, const TileScratch& f) {
  const float infinity = __builtin_inff();
  for (int64_t lane = block.lane; lane < block.lane_end; lane += W) {
    float* x = f.x + lane;
    const vf before = load(f.max + lane);
    vf highest = before;
    for (int64_t j = 0; j < block.keys; ++j) highest = max(highest, load(x + j * kLanes));
    const vf shift = select(highest == -infinity, zero(), highest);  // nothing seen yet: p = e^-inf
    const vf rescale = exp_flush(before - shift);
    vf sum = zero();  // of the block alone: rounding errors grow with its keys, not with all keys
    const auto weight = [&](int64_t j) BIGKERN_FN {
      const vf p = exp_flush(load(x + j * kLanes) - shift);
      sum += p;
      return DROPPED ? p * load(f.kept + j * kLanes + lane) : p;
    };
    if constexpr (paired<T>) {
      for (int64_t j = 0; j < block.keys; j += 2) {
        const vf even = weight(j);
        const vf odd = j + 1 < block.keys ? weight(j + 1) : zero();
        store(x + j / 2 * kLanes, pair_across(even, odd));
      }
    } else {
      for (int64_t j = 0; j < block.keys; ++j) store(x + j * kLanes, weight(j));
    }
    store(f.max + lane, highest);
    store(f.sum + lane, fma(load(f.sum + lane), rescale, sum));
    store(f.rescale + lane, rescale);
  }
}

// All rows of a tile against the keys begin .. end, which leaves o^T, max and sum in the scratch.
template <class T>
void attend_lanes(const Decode& call, const QueryTile& tile, const Horizon& horizon, int64_t begin,
                  int64_t end, const TileScratch& f) {
  const Shape& s = call.shape;
  const LaneRules rules(s, tile);
  pack_lanes(tile_rows<const T>(call.q, tile), s.D, f.q);
  std::fill_n(f.max, kLanes, -__builtin_inff());
  std::fill_n(f.sum, kLanes, 0.0f);
  std::fill_n(f.o, padded(s.Dv) * kLanes, 0.0f);

  for (int64_t key = begin; key < end;) {
    const KeyBlock block = horizon.block(key, std::min(end, array_end(call.pages, key)));
    key += block.keys;
    if (block.lane == block.lane_end) continue;
    const T* keys = key_at<T>(call, call.k, tile, block.first);
    const T* values = key_at<T>(call, call.v, tile, block.first);
    const Left<Element<T>> k = key_rows(keys, call.k.row, block.keys, s.D, f.k);
    const int64_t behind = std::min({end, array_end(call.pages, block.first), key + kKeys}) - key;
    dot_lanes<T>(s, block, k, f.q, f.x, rows_ahead(values, call.v.row, block.keys, s.Dv));
    restrict_scores<T>(s, tile, horizon, rules, block, f.x, nullptr);
    if (s.dropout.active()) draw_block(s, rules, block, f.kept);
    s.dropout.active() ? online_softmax<T, true>(block, f) : online_softmax<T, false>(block, f);
    const Left<Element<T>> v = key_columns(values, call.v.row, block.keys, s.Dv, f.v);
    multiply(
        Product<Element<T>>{s.Dv, words_of<T>(block.keys), v.data, v.row, v.column,
                            reinterpret_cast<const Element<T>*>(f.x), kLanes, f.o, kLanes, 1.0f,
                            true, f.rescale,
                            rows_ahead(keys + block.keys * call.k.row, call.k.row, behind, s.D)},
        block.lane, block.lane_end);
  }
}

// o and lse of a tile from the sums; a lane that saw nothing has sum 0 and max -inf. A sink is a
// key that all see and that has no value.
template <class T>
void finish_tile(const Decode& call, const QueryTile& tile, const TileScratch& f) {
  const Shape& s = call.shape;
  if (s.sinks.data != nullptr) {
    for (int64_t lane = 0; lane < tile.rows; ++lane) f.x[lane] = per_head(s.sinks, tile, lane);
    std::fill(f.x + tile.rows, f.x + kLanes, -__builtin_inff());
  }
  for (int64_t lane = 0; lane < kLanes; lane += W) {
    vf sum = load(f.sum + lane), highest = load(f.max + lane), factor = set1(1.0f);
    if (s.sinks.data != nullptr) {
      const vf sink = load(f.x + lane), most = max(sink, highest);
      const vf shift = select(most == -__builtin_inff(), zero(), most);
      factor = exp_flush(highest - shift);
      sum = fma(sum, factor, exp_flush(sink - shift));
      highest = most;
    }
    store(f.rescale + lane, select(sum == 0.0f, zero(), factor / sum));
    store(f.max + lane, highest + log(sum));
  }
  unpack_lanes(f.o, f.rescale, s.Dv, tile_rows<T>(call.o, tile));
  for (int64_t lane = 0; lane < tile.rows; ++lane) {
    *statistic_at(call.lse, tile, lane) = f.max[lane];
  }
}

// The same for a part of the keys: the sums themselves.
inline void save_part(const Shape& s, const QueryTile& tile, const TileScratch& f, float* results) {
  TileRows<float> o;
  o.rows = tile.rows;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const RowResult row(s, results, r);
    *row.max = f.max[r], *row.sum = f.sum[r], o.row[r] = row.o;
  }
  std::fill_n(f.rescale, kLanes, 1.0f);
  unpack_lanes(f.o, f.rescale, padded(s.Dv), o);
}

// ---- tasks --------------------------------------------------------------------------------------

// A part of a tile's keys; a whole one also writes o and lse.
template <class T>
void attend(const Decode& call, const QueryTile& tile, int64_t part, int64_t parts, float* result,
            Arena arena) {
  const Shape& s = call.shape;
  const Horizon horizon(s, tile);
  const Slice keys = slice_of(horizon.end - horizon.begin, kKeys, part, parts);
  const int64_t begin = horizon.begin + keys.begin, end = horizon.begin + keys.end;
  if (few_rows(s, tile.sequence)) {
    const RowsScratch scratch(arena, s);
    float* results = parts == 1 ? scratch.results : result;
    attend_rows<T>(call, tile, horizon, begin, end, scratch, results);
    if (parts == 1) join_parts<T>(call, tile, results, 1, 0);
  } else {
    const TileScratch scratch(arena, s);
    attend_lanes<T>(call, tile, horizon, begin, end, scratch);
    parts == 1 ? finish_tile<T>(call, tile, scratch) : save_part(s, tile, scratch, result);
  }
}

template <class T>
void forward_all(const Decode& call, const Parallel& parallel) {
  const Shape& s = call.shape;
  const ForwardWorkspace work(call.workspace, s, parallel.threads);
  const int64_t rows = rows_per_tile(call, parallel.threads);
  share_forward(call, rows, parallel.threads, work.shares);
  const auto tile_of = [&](int64_t b, int64_t kv_head, int64_t tile) {
    return QueryTile(s, b, kv_head, sequence_of(call, b), tile * rows, rows);
  };

  run_tasks(work.shares[s.B].task, parallel, [&](int64_t index, int worker) BIGKERN_FN {
    const Task task = task_at(s, work.shares, index);
    const Share& share = work.shares[task.batch];
    const int64_t tile = share.units - 1 - task.unit;  // causal: the longest first
    attend<T>(call, tile_of(task.batch, task.kv_head, tile), task.part, share.parts,
              work.result(s, task.result), work.of_worker(worker));
  });

  for (int64_t b = 0; b < s.B; ++b) {
    const Share& share = work.shares[b];
    for (int64_t unit = 0; share.parts > 1 && unit < s.Hkv * share.units; ++unit) {
      const QueryTile tile = tile_of(b, unit / share.units, share.units - 1 - unit % share.units);
      join_parts<T>(call, tile, work.result(s, share.result + unit * share.parts), share.parts,
                    kLanes * RowResult::floats(s));
    }
  }
}

}  // namespace

void forward(const Decode& call, const Parallel& parallel) {
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
