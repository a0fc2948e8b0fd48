// Flash attention's backward pass on one thread's tile of queries: the scores again, then the four
// products that lead to dq, dk and dv. Compiled once per instruction set.
//
//   for each block of keys (a key is a row, a query a lane):
//     p  [keys, 64] = e^(k q^T - lse)            dv [keys, Dv] += p  dout     in the workspace
//     ds [keys, 64] = p (v dout^T - delta)       dk [keys, D]  += ds q        in the workspace
//                                                dq^T [D, 64]  += k^T ds      stays in L1
//
// delta = rowsum(dout o) - dlse. With dropout p and v dout^T are dropped alike, but ds keeps its p;
// with a softcap ds is multiplied by its slope.
//
// A task goes through all tiles of a key head, or through every parts-th of them: then the parts'
// sums are added in a second pass, always in the same order, without atomics.

#include <algorithm>

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "attention/cpu/dbias.inl"
#endif

namespace bigkern::attention::BIGKERN_ISA {
namespace {

// dk [Sk, padded(D)] and dv [Sk, padded(Dv)] of one task, in floats.
struct KeySums {
  float *dk, *dv;

  KeySums(const Shape& s, int64_t Sk, float* sums) : dk(sums), dv(sums + Sk * padded(s.D)) {}
};

// p and ds in place of x and dp. With pairs both become rows of bf16, and ds is also kept as pairs
// of neighbouring keys.
template <class T, bool GENERAL>
void weigh_block(const Shape& s, const KeyBlock& block, const BackwardScratch& f) {
  const float* kept = GENERAL && s.dropout.active() ? f.kept : nullptr;
  for (int64_t lane = block.lane; lane < block.lane_end; lane += W) {
    const vf lse = load(f.lse + lane), delta = load(f.delta + lane);
    vf even = zero();
    for (int64_t j = 0; j < block.keys; ++j) {
      const int64_t row = j * kLanes;
      auto [p, ds] = weigh(f, kept, row + lane, lse, delta);
      if (GENERAL && s.softcap != 0) ds *= load(f.slope + row + lane);
      if constexpr (paired<T>) {
        store_raw(reinterpret_cast<bf16*>(f.p + row) + lane, operand_bf16(p));
        store_raw(reinterpret_cast<bf16*>(f.ds + row) + lane, operand_bf16(ds));
        if (j % 2 == 0) even = ds;
        const bool last = j + 1 == block.keys;
        if (j % 2 == 1 || last) {
          store(f.ds_pairs + j / 2 * kLanes + lane, pair_across(even, j % 2 == 1 ? ds : zero()));
        }
      } else {
        store(f.p + row + lane, p);
        store(f.ds + row + lane, ds);
      }
    }
  }
}

// sums [keys, padded(D)] += p [keys, lanes] x [lanes, padded(D)]
template <class T>
void add_over_lanes(const KeyBlock& block, const float* p, const float* x, int64_t D, float* sums) {
  using E = Element<T>;
  const int64_t row = padded(D), first = words_of<T>(block.lane);
  multiply(Product<E>{block.keys, words_of<T>(block.lane_end - block.lane),
                      reinterpret_cast<const E*>(p) + first, kLanes, 1,
                      reinterpret_cast<const E*>(x) + first * row, row, sums, row, 1.0f, true},
           0, row);
}

template <class T>
void backpropagate(const Backward& call, const QueryTile& tile, const BackwardScratch& f,
                   const KeySums& sums) {
  using E = Element<T>;
  const Shape& s = call.shape;
  const Horizon horizon(s, tile);
  const LaneRules rules(s, tile);
  load_lanes<T>(call, tile, f);

  for (int64_t key = horizon.begin; key < horizon.end;) {
    const KeyBlock block = horizon.block(key, horizon.end);
    key += block.keys;
    if (block.lane == block.lane_end) continue;
    const auto [keys, k] = compute_terms<T>(call, tile, horizon, rules, block, f);
    s.general() ? weigh_block<T, true>(s, block, f) : weigh_block<T, false>(s, block, f);
    add_over_lanes<T>(block, f.p, f.dout_rows, s.Dv, sums.dv + block.first * padded(s.Dv));
    add_over_lanes<T>(block, f.ds, f.q_rows, s.D, sums.dk + block.first * padded(s.D));
    const Left<E> kt = paired<T> ? key_columns(keys, call.k.row, block.keys, s.D, f.k_columns)
                                 : Left<E>{k.data, k.column, k.row};
    multiply(Product<E>{s.D, words_of<T>(block.keys), kt.data, kt.row, kt.column,
                        reinterpret_cast<const E*>(paired<T> ? f.ds_pairs : f.ds), kLanes, f.dq,
                        kLanes, 1.0f, true},
             block.lane, block.lane_end);
  }
  std::fill_n(f.delta, kLanes, s.scale);
  unpack_lanes(f.dq, f.delta, s.D, tile_rows<T>(call.dq, tile));
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

// dk and dv of the keys begin .. end of a key head from the sums of its parts.
template <class T>
void store_keys(const Backward& call, int64_t b, int64_t kv_head, int64_t begin, int64_t end,
                float* sums, int64_t parts, int64_t stride) {
  const Shape& s = call.shape;
  const Sequence sequence = s.sequence(b);
  const KeySums first(s, sequence.Sk, sums);
  for (int64_t key = begin; key < end; ++key) {
    store_sums(first.dk + key * padded(s.D), parts, stride, s.D, s.scale,
               row_at<T>(call.dk, b, kv_head, sequence.k_begin + key));
    store_sums(first.dv + key * padded(s.Dv), parts, stride, s.Dv, 1.0f,
               row_at<T>(call.dv, b, kv_head, sequence.k_begin + key));
  }
}

// dq, and a part of dk and dv; a whole key head also writes those.
template <class T>
void backward_task(const Backward& call, const Task& task, int64_t parts,
                   const BackwardScratch& scratch, float* sums) {
  const Shape& s = call.shape;
  const Sequence sequence = s.sequence(task.batch);
  std::fill_n(sums, sums_floats(s, sequence.Sk), 0.0f);
  for (int64_t first = task.part * kLanes; first < rows_of(s, sequence); first += parts * kLanes) {
    const QueryTile tile(s, task.batch, task.kv_head, sequence, first, kLanes);
    backpropagate<T>(call, tile, scratch, KeySums(s, sequence.Sk, sums));
  }
  if (parts == 1) store_keys<T>(call, task.batch, task.kv_head, 0, sequence.Sk, sums, 1, 0);
}

template <class T>
void backward_all(const Backward& call, const Parallel& parallel) {
  const Shape& s = call.shape;
  const BackwardWorkspace work(call.workspace, s, parallel.threads);
  share_backward(s, parallel.threads, work.shares);

  run_tasks(work.shares[s.B].task, parallel, [&](int64_t index, int worker) BIGKERN_FN {
    Arena arena = work.of_worker(worker);
    const BackwardScratch scratch(arena, s);
    const Task task = task_at(s, work.shares, index);
    const int64_t parts = work.shares[task.batch].parts;
    float* sums =
        parts == 1 ? work.worker_sums + worker * work.sums : work.results + task.result * work.sums;
    backward_task<T>(call, task, parts, scratch, sums);
  });

  for (int64_t b = 0; b < s.B; ++b) {
    const Share& share = work.shares[b];
    const int64_t Sk = s.sequence(b).Sk;
    if (share.parts == 1) continue;
    parallel.for_range(0, s.Hkv * Sk, 64, [&](int64_t begin, int64_t end) BIGKERN_FN {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t head = at / Sk, key = at % Sk;
        store_keys<T>(call, b, head, key, key + 1,
                      work.results + (share.result + head * share.parts) * work.sums, share.parts,
                      work.sums);
      }
    });
  }
  if (call.dbias.data != nullptr) bias_gradient<T>(call, parallel);
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
