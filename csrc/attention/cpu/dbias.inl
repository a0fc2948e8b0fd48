// The gradient of the bias: ds summed where the bias was broadcast. A pass of its own, in which
// each tile of the *bias* has one owner, who walks over all that read it and computes their ds
// again. Compiled once per instruction set.
//
//                     keys ->                      a task: up to 64 queries x 256 keys of one head
//             +-----+-----+-----+                  of one batch; of all heads, batches, queries or
//   queries   | own |     |     |   x heads        keys instead, where the bias has only one.
//             +-----+-----+-----+   x batches
//             |     |     |     |                  sums [keys, 64] in fp32; a bias that has one
//             +-----+-----+-----+                  query (key) is summed over lanes (keys) at last.

#include <algorithm>

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "attention/cpu/terms.inl"
#endif

namespace bigkern::attention::BIGKERN_ISA {
namespace {

struct Range {
  int64_t begin, end;
};

// The piece of a dimension that one of `pieces` owns: all of it where the bias has only one entry.
inline Range owned(int64_t size, int64_t stride, int64_t step, int64_t piece) {
  if (stride == 0) return {0, size};
  return {piece * step, at_most(size, (piece + 1) * step)};
}
inline int64_t pieces(int64_t size, int64_t stride, int64_t step) {
  return stride == 0 ? 1 : ceil_div(size, step);
}

// What one task owns of the bias.
struct BiasTile {
  Range batches, heads, queries, keys;
};

// sums [keys, 64] += ds of a tile of queries, keys counted from keys.begin; one row of sums where
// the bias has one key.
template <class T>
void add_score_gradients(const Backward& call, const QueryTile& tile, const Range& keys,
                         const BackwardScratch& f) {
  const Shape& s = call.shape;
  const Horizon horizon(s, tile);
  const LaneRules rules(s, tile);
  const float* kept = s.dropout.active() ? f.kept : nullptr;
  load_lanes<T>(call, tile, f);
  const int64_t end = std::min(keys.end, horizon.end);
  for (int64_t key = std::max(keys.begin, horizon.begin); key < end;) {
    const KeyBlock block = horizon.block(key, end);
    key += block.keys;
    if (block.lane == block.lane_end) continue;
    compute_terms<T>(call, tile, horizon, rules, block, f);
    for (int64_t lane = block.lane; lane < block.lane_end; lane += W) {
      const vf lse = load(f.lse + lane), delta = load(f.delta + lane);
      for (int64_t j = 0; j < block.keys; ++j) {
        const int64_t row = call.dbias.column == 0 ? 0 : block.first + j - keys.begin;
        float* sum = f.dbias + row * kLanes + lane;
        store(sum, load(sum) + weigh(f, kept, j * kLanes + lane, lse, delta).ds);
      }
    }
  }
}

// The tile's entries of dbias from the sums. op.cpp makes dbias contiguous: its columns are dense.
template <class T>
void store_bias(const Backward& call, const BiasTile& own, float* sums) {
  const Broadcast<void*>& dbias = call.dbias;
  const int64_t keys = dbias.column == 0 ? 1 : own.keys.end - own.keys.begin;
  if (dbias.row == 0) {
    for (int64_t j = 0; j < keys; ++j) {
      vf sum = zero();
      for (int64_t lane = 0; lane < kLanes; lane += W) sum += load(sums + j * kLanes + lane);
      sums[j * kLanes] = reduce_add(sum);
    }
  }
  TileRows<T> out;
  out.rows = dbias.row == 0 ? 1 : own.queries.end - own.queries.begin;
  for (int64_t i = 0; i < out.rows; ++i) {
    const Row row{own.heads.begin, own.queries.begin + i};
    out.row[i] = entries_at<T>(dbias, own.batches.begin, row) + own.keys.begin * dbias.column;
  }
  float ones[kLanes];
  std::fill_n(ones, kLanes, 1.0f);
  unpack_lanes(sums, ones, keys, out);
}

template <class T>
void bias_task(const Backward& call, const BiasTile& own, const BackwardScratch& f) {
  const Shape& s = call.shape;
  std::fill_n(f.dbias, kBiasKeys * kLanes, 0.0f);
  for (int64_t b = own.batches.begin; b < own.batches.end; ++b) {
    for (int64_t h = own.heads.begin; h < own.heads.end; ++h) {
      const int64_t group = s.Hq / s.Hkv;
      for (int64_t i = own.queries.begin; i < own.queries.end; i += kLanes) {
        const QueryTile tile(s, b, h / group, s.sequence(b), h % group * s.Sq + i,
                             at_most(own.queries.end - i, kLanes));
        add_score_gradients<T>(call, tile, own.keys, f);
      }
    }
  }
  store_bias<T>(call, own, f.dbias);
}

template <class T>
void bias_gradient(const Backward& call, const Parallel& parallel) {
  const Shape& s = call.shape;
  const Broadcast<void*>& dbias = call.dbias;
  const BackwardWorkspace work(call.workspace, s, parallel.threads);
  const int64_t batches = pieces(s.B, dbias.batch, 1), heads = pieces(s.Hq, dbias.head, 1),
                tiles = pieces(s.Sq, dbias.row, kLanes),
                key_tiles = pieces(s.Sk, dbias.column, kBiasKeys);
  run_tasks(
      batches * heads * tiles * key_tiles, parallel, [&](int64_t task, int worker) BIGKERN_FN {
        Arena arena = work.of_worker(worker);
        const BackwardScratch scratch(arena, s);
        const int64_t tile = task / key_tiles, head = tile / tiles;
        bias_task<T>(
            call,
            {owned(s.B, dbias.batch, 1, head / heads), owned(s.Hq, dbias.head, 1, head % heads),
             owned(s.Sq, dbias.row, kLanes, tile % tiles),
             owned(s.Sk, dbias.column, kBiasKeys, task % key_tiles)},
            scratch);
      });
}

}  // namespace
}  // namespace bigkern::attention::BIGKERN_ISA
