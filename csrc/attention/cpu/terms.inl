// A tile of queries against a block of keys in the backward pass: the scores again, the gradients
// that reach the weights, and from both what dq, dk, dv and dbias are summed from. Compiled once
// per instruction set.
//
//   p = e^(x - lse)      ds = p (dp - delta)      dp = v dout^T      delta = rowsum(dout o) - dlse
//
// With dropout both p and dp are multiplied by its factors, but ds keeps its own p.

#include <algorithm>

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "attention/cpu/forward.inl"
#endif

namespace bigkern::attention::BIGKERN_ISA {
namespace {

// What the lanes bring: q and dout both ways, lse, delta.
template <class T>
void load_lanes(const Backward& call, const QueryTile& tile, const BackwardScratch& f) {
  const Shape& s = call.shape;
  const auto q = tile_rows<const T>(call.q, tile), dout = tile_rows<const T>(call.dout, tile),
             o = tile_rows<const T>(call.o, tile);
  pack_lanes(q, s.D, f.q);
  pack_lanes(dout, s.Dv, f.dout);
  pack_lane_rows(q, s.D, f.q_rows);
  pack_lane_rows(dout, s.Dv, f.dout_rows);
  std::fill_n(f.dq, padded(s.D) * kLanes, 0.0f);
  std::fill_n(f.lse, kLanes, __builtin_inff());  // p = 0 in lanes without a row
  std::fill_n(f.delta, kLanes, 0.0f);
  for (int64_t lane = 0; lane < tile.rows; ++lane) {
    const float lse = *statistic_at(call.lse, tile, lane);
    f.lse[lane] = lse == -__builtin_inff() ? 0.0f : lse;  // and where nothing was seen
    vf delta = zero();
    for (int64_t d = 0; d < s.Dv; d += W) {
      delta =
          fma(load_some(dout.row[lane] + d, s.Dv - d), load_some(o.row[lane] + d, s.Dv - d), delta);
    }
    f.delta[lane] = reduce_add(delta);
    if (call.dlse.data != nullptr) f.delta[lane] -= *statistic_at(call.dlse, tile, lane);
  }
}

// A tile against one block of keys: what all that is computed there starts from.
template <class T>
struct BlockTerms {
  const T* keys;
  Left<Element<T>> k;  // [keys, D]
};

// The scores in f.p, the gradients that reach the weights in f.ds, dropout's factors in f.kept.
template <class T>
BlockTerms<T> compute_terms(const Backward& call, const QueryTile& tile, const Horizon& horizon,
                            const LaneRules& rules, const KeyBlock& block,
                            const BackwardScratch& f) {
  using E = Element<T>;
  const Shape& s = call.shape;
  const int64_t first = tile.sequence.k_begin + block.first;
  const T* keys = row_at<T>(call.k, tile.batch, tile.kv_head, first);
  const T* values = row_at<T>(call.v, tile.batch, tile.kv_head, first);
  const Left<E> k = key_rows(keys, call.k.row, block.keys, s.D, f.k);
  if constexpr (paired<T>) {
    dot_lanes<T>(s, block, k, f.q, f.p, {});
  } else {
    few_rows(s, tile.sequence) ? dot_rows(s, tile, block, k, f.q_rows, f.p)
                               : dot_lanes<T>(s, block, k, f.q, f.p, {});
  }
  restrict_scores<T>(s, tile, horizon, rules, block, f.p, s.softcap != 0 ? f.slope : nullptr);
  const Left<E> v = key_rows(values, call.v.row, block.keys, s.Dv, f.v);
  multiply(Product<E>{block.keys, words_of<T>(s.Dv), v.data, v.row, v.column,
                      reinterpret_cast<const E*>(f.dout), kLanes, f.ds, kLanes},
           block.lane, block.lane_end);
  if (s.dropout.active()) draw_block(s, rules, block, f.kept);
  return {keys, k};
}

struct Weighed {
  vf p, ds;
};

// p = e^(x - lse) and ds = p (dp - delta) of one vector, `at` its place in the block; p leaves as
// dropout lets it. kept is null without dropout.
ATTENTION_INLINE Weighed weigh(const BackwardScratch& f, const float* kept, int64_t at, vf lse,
                               vf delta) {
  const vf p = exp_flush(load(f.p + at) - lse);
  const vf dp = load(f.ds + at);
  if (kept == nullptr) return {p, p * (dp - delta)};
  const vf factor = load(kept + at);
  return {p * factor, p * fma(dp, factor, -delta)};
}

}  // namespace
}  // namespace bigkern::attention::BIGKERN_ISA
