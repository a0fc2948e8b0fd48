// The scores of one block of keys for the lanes of a tile, shared by forward and backward. Compiled
// once per instruction set.

namespace bigkern::attention::BIGKERN_ISA {
namespace {

// Keys after a lane's last one get -inf.
void forbid_future(const Horizon& horizon, const KeyBlock& block, int64_t lanes, float* x) {
  const vf forbidden = set1(-__builtin_inff());
  for (int64_t lane = block.lane; lane < lanes; lane += W) {
    const vi last = load_raw<vi>(horizon.last + lane);
    for (int64_t j = 0; j < block.keys; ++j) {
      float* p = x + j * kLanes + lane;
      store(p, select(last >= static_cast<int32_t>(block.first + j), load(p), forbidden));
    }
  }
}

// Whether all lanes of the tile read the same row of a broadcast tensor.
inline bool one_row(const Shape& s, const QueryTile& tile, const Broadcast<const void*>& b) {
  const bool one_head = row_of(s, tile, 0).head == row_of(s, tile, tile.rows - 1).head;
  return b.row == 0 && (b.head == 0 || one_head);
}

// Calls f(value, scores, count) for each entry of a broadcast tensor and the scores [count] it
// applies to.
template <class T, class F>
ATTENTION_INLINE void for_each_entry(const Shape& s, const QueryTile& tile,
                                     const Broadcast<const void*>& b, const KeyBlock& block,
                                     float* x, const F& f) {
  const bool shared = one_row(s, tile, b);
  for (int64_t lane = shared ? 0 : block.lane; lane < (shared ? 1 : tile.rows); ++lane) {
    const T* entry = row_at<T>(b, tile.batch, row_of(s, tile, lane)) + block.first * b.column;
    for (int64_t j = 0; j < block.keys; ++j) {
      f(entry[j * b.column], x + j * kLanes + lane, shared ? kLanes : 1);
    }
  }
}

// Adds the bias to scores x [keys, 64]; -inf where causal or mask forbid.
template <class T>
void restrict_scores(const Shape& s, const QueryTile& tile, const Horizon& horizon,
                     const KeyBlock& block, int64_t lanes, float* x) {
  if (s.bias.data != nullptr) {
    for_each_entry<T>(s, tile, s.bias, block, x, [&](T entry, float* at, int64_t count) BIGKERN_FN {
      for (int64_t i = 0; i < count; ++i) at[i] += to_float(entry);
    });
  }
  if (s.mask.data != nullptr) {
    for_each_entry<bool>(s, tile, s.mask, block, x,
                         [&](bool allowed, float* at, int64_t count) BIGKERN_FN {
                           for (int64_t i = 0; i < count; ++i)
                             at[i] = allowed ? at[i] : -__builtin_inff();
                         });
  }
  if (block.diagonal) forbid_future(horizon, block, lanes, x);
}

// x [keys, 64] = scale q k^T, for the lanes block.lane .. lanes.
template <class T>
void dot_lanes(const Shape& s, const KeyBlock& block, int64_t lanes, const Left<Element<T>>& k,
               const float* q, float* x) {
  multiply(Product<Element<T>>{block.keys, words_of<T>(s.D), k.data, k.row, k.column,
                               reinterpret_cast<const Element<T>*>(q), kLanes, x, kLanes, s.scale},
           block.lane, lanes);
}

}  // namespace
}  // namespace bigkern::attention::BIGKERN_ISA
