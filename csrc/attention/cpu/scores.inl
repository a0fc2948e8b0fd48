// The scores of one block of keys for the lanes of a tile, x [keys, 64], shared by forward and
// backward. Compiled once per instruction set.
//
//   x = scale k q^T      x = c tanh(x / c)      x += bias - slope |place - key|      -inf if not
//   seen

#include <cstring>

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "attention/cpu/tile.inl"
#endif

namespace bigkern::attention::BIGKERN_ISA {
namespace {

// x [keys, 64] = scale k q^T, for the lanes of the block. Sums are short: what is wrong with a
// score by 1e-6 is wrong with its weight by as much.
template <class T>
void dot_lanes(const Shape& s, const KeyBlock& block, const Left<Element<T>>& k, const float* q,
               float* x, const Ahead& next) {
  using E = Element<T>;
  Product<E> product{
      block.keys, words_of<T>(s.D), k.data, k.row, k.column, reinterpret_cast<const E*>(q), kLanes,
      x,          kLanes,           s.scale};
  product.ahead = next;
  product.chunk = 32;
  multiply(product, block.lane, block.lane_end);
}

// c tanh(x / c); tanh's derivative there, 1 - tanh^2, to `slope` unless null.
inline void cap_scores(float softcap, const KeyBlock& block, float* x, float* slope) {
  const vf inverse = set1(1.0f / softcap);
  for (int64_t j = 0; j < block.keys; ++j) {
    for (int64_t at = j * kLanes + block.lane; at < j * kLanes + block.lane_end; at += W) {
      const vf bent = tanh(load(x + at) * inverse);
      store(x + at, bent * softcap);
      if (slope != nullptr) store(slope + at, fma(0.0f - bent, bent, set1(1.0f)));
    }
  }
}

typedef uint8_t vb __attribute__((vector_size(W)));  // W bools, as stored

ATTENTION_INLINE vf load_some(const bool* p, int64_t n) {
  vb bytes{};
  memcpy(&bytes, p, static_cast<size_t>(n >= W ? W : n));
  return __builtin_convertvector(bytes, vf);
}

// n <= W entries, `stride` apart.
template <class T>
ATTENTION_INLINE vf load_strided(const T* p, int64_t stride, int64_t n) {
  if (stride == 1) return load_some(p, n);
  float entries[W] = {};
  for (int64_t i = 0; i < at_most(n, W); ++i) entries[i] = to_float(p[i * stride]);
  return load(entries);
}

// Entries of a broadcast tensor for W lanes and up to W keys; entries[j] holds key j's.
template <class T>
void load_entries(const Broadcast<const void*>& b, const QueryTile& tile, int64_t lane, int64_t key,
                  int64_t keys, vf (&entries)[W]) {
  for (int64_t i = 0; i < W; ++i) {
    const bool missing = lane + i >= tile.rows;
    const T* row = entries_at<const T>(b, tile.batch, tile.row[missing ? 0 : lane + i]);
    entries[i] = missing ? zero() : load_strided(row + key * b.column, b.column, keys);
  }
  transpose(entries);
}

// Calls f(x, entries) for each vector of scores and what a broadcast tensor says to them.
template <class T, class F>
ATTENTION_INLINE void for_each_entry(const Broadcast<const void*>& b, const QueryTile& tile,
                                     const KeyBlock& block, float* x, const F& f) {
  for (int64_t lane = block.lane; lane < block.lane_end; lane += W) {
    for (int64_t first = 0; first < block.keys; first += W) {
      const int64_t keys = at_most(block.keys - first, W);
      vf entries[W];
      load_entries<T>(b, tile, lane, block.first + first, keys, entries);
      for (int64_t j = 0; j < keys; ++j) {
        float* at = x + (first + j) * kLanes + lane;
        store(at, f(load(at), entries[j]));
      }
    }
  }
}

inline void add_alibi(const LaneRules& rules, const KeyBlock& block, float* x) {
  for (int64_t lane = block.lane; lane < block.lane_end; lane += W) {
    const vf slope = load(rules.slope + lane);
    const vi place = load_raw<vi>(rules.place + lane);
    for (int64_t j = 0; j < block.keys; ++j) {
      const vi back = place - static_cast<int32_t>(block.first + j);
      float* at = x + j * kLanes + lane;
      store(at, load(at) - slope * abs(__builtin_convertvector(back, vf)));
    }
  }
}

// Keys outside a lane's window get -inf.
inline void forbid_unseen(const Horizon& horizon, const KeyBlock& block, float* x) {
  const vf forbidden = set1(-__builtin_inff());
  for (int64_t lane = block.lane; lane < block.lane_end; lane += W) {
    const vi first = load_raw<vi>(horizon.first + lane), last = load_raw<vi>(horizon.last + lane);
    for (int64_t j = 0; j < block.keys; ++j) {
      const vi key = set1_int(static_cast<int32_t>(block.first + j));
      float* at = x + j * kLanes + lane;
      store(at, select((first <= key) & (key <= last), load(at), forbidden));
    }
  }
}

// Everything that happens to dot products x; slope as cap_scores'.
template <class T>
void restrict_scores(const Shape& s, const QueryTile& tile, const Horizon& horizon,
                     const LaneRules& rules, const KeyBlock& block, float* x, float* slope) {
  if (s.softcap != 0) cap_scores(s.softcap, block, x, slope);
  if (s.bias.data != nullptr) {
    for_each_entry<T>(s.bias, tile, block, x,
                      [&](vf score, vf bias) BIGKERN_FN { return score + bias; });
  }
  if (s.slopes.data != nullptr) add_alibi(rules, block, x);
  if (s.mask.data != nullptr) {
    const vf forbidden = set1(-__builtin_inff());
    for_each_entry<bool>(s.mask, tile, block, x, [&](vf score, vf allowed) BIGKERN_FN {
      return select(allowed != 0.0f, score, forbidden);
    });
  }
  if (block.edge) forbid_unseen(horizon, block, x);
}

// ---- dropout ------------------------------------------------------------------------------------

// What dropout multiplies weights by: 0 or 1 / (1 - p), from the bits of (a, c) at key j.
ATTENTION_INLINE vf draw(const Dropout& dropout, vu a, vu c, vu j) {
  return select(vi(draw_bits(a, c, j) >= dropout.threshold), set1(dropout.scale), zero());
}

// The same for a block: kept [keys, 64].
inline void draw_block(const Shape& s, const LaneRules& rules, const KeyBlock& block, float* kept) {
  for (int64_t lane = block.lane; lane < block.lane_end; lane += W) {
    const vu a = load_raw<vu>(rules.a + lane), c = load_raw<vu>(rules.c + lane);
    for (int64_t j = 0; j < block.keys; ++j) {
      const vu key = vu{} + static_cast<uint32_t>(block.first + j);
      store(kept + j * kLanes + lane, draw(s.dropout, a, c, key));
    }
  }
}

}  // namespace
}  // namespace bigkern::attention::BIGKERN_ISA
