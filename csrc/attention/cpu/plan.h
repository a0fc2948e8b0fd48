// How the CPU kernels cut attention into tiles of queries and blocks of keys: the part of them that
// no instruction set changes. README.md has the picture.
//
// The query heads that share a key head are stacked into rows: row r is query r % Sq of the group's
// head r / Sq. A tile is up to 64 rows, and in a tile a row is a *lane*: every matrix is stored
// transposed, [.., 64], so that the softmax never crosses lanes and keys and values are read where
// they lie.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "attention/attention.h"

namespace bigkern::attention::cpu {

constexpr int64_t kLanes = 64;      // queries of a tile: four AVX-512 vectors
constexpr int64_t kLaneGroup = 16;  // lanes that a block at an edge of the window takes or leaves
constexpr int64_t kKeys = 64;       // keys of a block
constexpr int64_t kEdgeKeys = 16;   // keys of a block that an edge crosses

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t padded(int64_t n) { return ceil_div(n, 16) * 16; }  // whole vectors on every level

// ---- what is called -----------------------------------------------------------------------------

// The forward pass is a decoding whose keys lie in no pages and end nowhere early.
inline Decode as_decode(const Forward& f) {
  return {f.shape, f.q, f.k, f.v, nullptr, {nullptr, 0, 0}, f.o, f.lse, f.workspace};
}

inline Sequence sequence_of(const Decode& call, int64_t b) {
  Sequence sequence = call.shape.sequence(b);
  if (call.lengths != nullptr) {
    sequence.Sk = call.lengths[b];
    sequence.offset = sequence.Sk - sequence.Sq;
  }
  return sequence;
}

// ---- tiles of queries ---------------------------------------------------------------------------

// Rows of a key head's stack.
inline int64_t rows_of(const Shape& s, const Sequence& sequence) {
  return s.Hq / s.Hkv * sequence.Sq;
}

// So few rows that a tile would leave most of its lanes empty: decode.inl.
constexpr int64_t kFewRows = 5;
inline bool few_rows(const Shape& s, const Sequence& sequence) {
  return rows_of(s, sequence) <= kFewRows;
}

// A row of the stack.
struct Row {
  int64_t head, index;  // the index-th query of its sequence
};

// Rows first .. first + rows of the stack of one key head, in one sequence.
struct QueryTile {
  int64_t batch, kv_head;
  Sequence sequence;
  int64_t rows;
  Row row[kLanes];

  QueryTile(const Shape& s, int64_t batch, int64_t kv_head, const Sequence& sequence, int64_t first,
            int64_t most)
      : batch(batch),
        kv_head(kv_head),
        sequence(sequence),
        rows(std::min(rows_of(s, sequence) - first, most)) {
    Row next{kv_head * (s.Hq / s.Hkv), first};
    if (rows > 0) next = {next.head + first / sequence.Sq, first % sequence.Sq};
    for (int64_t lane = 0; lane < rows; ++lane) {
      row[lane] = next;
      if (++next.index == sequence.Sq) next = {next.head + 1, 0};
    }
  }
};

template <class T>
const T* row_at(const View<const void*>& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const T*>(x.data) + batch * x.batch + head * x.head + row * x.row;
}
template <class T>
T* row_at(const View<void*>& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(x.data) + batch * x.batch + head * x.head + row * x.row;
}
template <class T, class Pointer>
T* entries_at(const Broadcast<Pointer>& x, int64_t batch, const Row& row) {
  return static_cast<T*>(x.data) + batch * x.batch + row.head * x.head + row.index * x.row;
}
template <class Pointer>
Pointer statistic_at(const Statistic<Pointer>& x, const QueryTile& tile, int64_t lane) {
  const Row& row = tile.row[lane];
  return x.data + tile.batch * x.batch + row.head * x.head + tile.sequence.q_begin + row.index;
}
inline float per_head(const PerHead& x, const QueryTile& tile, int64_t lane) {
  return x.data[tile.batch * x.batch + tile.row[lane].head];
}

// ---- keys ---------------------------------------------------------------------------------------

// The row of k or v that belongs to a key of the tile's sequence.
template <class T>
const T* key_at(const Decode& call, const View<const void*>& x, const QueryTile& tile,
                int64_t key) {
  const Pages& pages = call.pages;
  if (pages.table == nullptr) {
    return row_at<T>(x, tile.batch, tile.kv_head, tile.sequence.k_begin + key);
  }
  const int64_t page = pages.table[tile.batch * pages.row + key / pages.page_size];
  return row_at<T>(x, page, tile.kv_head, key % pages.page_size);
}

// From which key on rows no longer lie in one array with key `key`.
inline int64_t array_end(const Pages& pages, int64_t key) {
  return pages.table == nullptr ? INT64_MAX : (key / pages.page_size + 1) * pages.page_size;
}

// Keys first .. first + keys, for the lanes `lane` .. `lane_end`; the others see none of them.
struct KeyBlock {
  int64_t first, keys, lane, lane_end;
  bool edge;  // some lanes see only some of the keys
};

// Which keys each lane of a tile sees through the window.
struct Horizon {
  int32_t first[kLanes], last[kLanes];  // of the keys that a lane sees; last < first: none
  int64_t lanes;                        // whole vectors
  int64_t begin, end;                   // no lane sees a key before or behind these
  int64_t all_begin, all_end;           // every lane sees the keys between these

  Horizon(const Shape& s, const QueryTile& tile)
      : lanes(padded(tile.rows)),
        begin(tile.sequence.Sk),
        end(0),
        all_begin(0),
        all_end(tile.sequence.Sk) {
    std::fill_n(first, kLanes, 0);
    std::fill_n(last, kLanes, -1);
    for (int64_t lane = 0; lane < tile.rows; ++lane) {
      const int64_t place = tile.row[lane].index + tile.sequence.offset;
      const int64_t from = std::clamp<int64_t>(place - s.left, 0, tile.sequence.Sk);
      const int64_t to = std::clamp<int64_t>(place + s.right + 1, 0, tile.sequence.Sk);
      all_begin = std::max(all_begin, from);
      all_end = std::min(all_end, to);
      if (from >= to) continue;
      begin = std::min(begin, from);
      end = std::max(end, to);
      first[lane] = static_cast<int32_t>(from);
      last[lane] = static_cast<int32_t>(to - 1);
    }
    begin = std::min(begin, end);
    if (begin < all_begin) all_begin = ceil_div(all_begin, kEdgeKeys) * kEdgeKeys;
    if (all_end < end) all_end = all_end / kEdgeKeys * kEdgeKeys;
  }

  // The block that begins at key `at` and ends before `limit`. Where nobody sees key `at`, a block
  // without lanes, up to the next key that somebody sees.
  KeyBlock block(int64_t at, int64_t limit) const {
    if (all_begin <= at && at < all_end) {
      return {at, std::min(kKeys, std::min(all_end, limit) - at), 0, lanes, false};
    }
    const bool before = at < all_begin && all_begin < all_end;
    const int64_t stop = std::min({at + kEdgeKeys, limit, before ? all_begin : limit});
    int64_t lane = lanes, lane_end = 0, next = limit;
    for (int64_t i = 0; i < lanes; ++i) {
      if (first[i] > at) next = std::min<int64_t>(next, first[i]);
      if (first[i] >= stop || last[i] < at) continue;
      lane = std::min(lane, i / kLaneGroup * kLaneGroup);
      lane_end = i / kLaneGroup * kLaneGroup + kLaneGroup;
    }
    if (lane_end == 0) return {at, next - at, 0, 0, true};
    return {at, stop - at, lane, lane_end, true};
  }
};

// ---- what depends on a lane, besides the window -------------------------------------------------

// For the features of a general shape; lanes without a row are 0.
struct LaneRules {
  float slope[kLanes];            // ALiBi's
  int32_t place[kLanes];          // the key at which a query stands
  uint32_t a[kLanes], c[kLanes];  // of its row of dropout's random bits

  LaneRules(const Shape& s, const QueryTile& tile) {
    if (!s.general()) return;
    std::fill_n(slope, kLanes, 0.0f);
    std::fill_n(place, kLanes, 0);
    std::fill_n(a, kLanes, 0u);
    std::fill_n(c, kLanes, 0u);
    for (int64_t lane = 0; lane < tile.rows; ++lane) {
      const Row& row = tile.row[lane];
      place[lane] = static_cast<int32_t>(row.index + tile.sequence.offset);
      if (s.slopes.data != nullptr) slope[lane] = per_head(s.slopes, tile, lane);
      const DropoutRow random = s.dropout.head(static_cast<uint32_t>(tile.batch * s.Hq + row.head))
                                    .row(static_cast<uint32_t>(row.index));
      a[lane] = random.a, c[lane] = random.c;
    }
  }
};

}  // namespace bigkern::attention::cpu
