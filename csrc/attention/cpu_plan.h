// How the CPU kernels cut attention into tiles and blocks, and where a worker's scratch lies: the
// part of them that no instruction set changes. README.md has the picture.
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

constexpr int64_t kLanes = 64;         // queries of a tile: four AVX-512 vectors
constexpr int64_t kLaneGroup = 16;     // lanes that a block near the diagonal takes or leaves
constexpr int64_t kKeys = 64;          // keys of a block
constexpr int64_t kDiagonalKeys = 16;  // keys of a block that the diagonal crosses

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t padded(int64_t n) { return ceil_div(n, 16) * 16; }  // whole vectors on every level

// ---- tiles of queries ---------------------------------------------------------------------------

inline int64_t rows_of_group(const Shape& s) { return s.Hq / s.Hkv * s.Sq; }

// Rows first .. first + rows of one key head.
struct QueryTile {
  int64_t batch, kv_head, first, rows;
};

// A row of a tensor [B, H, S, D] or [B, H, S, S], without its batch.
struct Row {
  int64_t head, index;
};

inline Row row_of(const Shape& s, const QueryTile& tile, int64_t lane) {
  const int64_t row = tile.first + lane;
  return {tile.kv_head * (s.Hq / s.Hkv) + row / s.Sq, row % s.Sq};
}

template <class T>
const T* row_at(const View<const void*>& x, int64_t batch, const Row& at) {
  return static_cast<const T*>(x.data) + batch * x.batch + at.head * x.head + at.index * x.row;
}
template <class T>
T* row_at(const View<void*>& x, int64_t batch, const Row& at) {
  return static_cast<T*>(x.data) + batch * x.batch + at.head * x.head + at.index * x.row;
}
template <class T>
const T* row_at(const Broadcast<const void*>& x, int64_t batch, const Row& at) {
  return static_cast<const T*>(x.data) + batch * x.batch + at.head * x.head + at.index * x.row;
}

// The rows of a tile: fewer than 64 where that would leave threads without work.
inline int64_t rows_per_tile(const Shape& s, int threads) {
  int64_t rows = kLanes;
  while (rows > kLaneGroup && s.B * s.Hkv * ceil_div(rows_of_group(s), rows) < threads) rows /= 2;
  return rows;
}

// ---- blocks of keys -----------------------------------------------------------------------------

// Keys first .. first + keys, for the lanes from `lane` on; the lanes before it see none of them.
struct KeyBlock {
  int64_t first, keys, lane;
  bool diagonal;  // some lanes see only some of the keys
};

// Which keys each lane of a tile sees by the causal rule.
struct Horizon {
  int32_t last[kLanes];  // the last key that a lane sees; negative: none
  int64_t all;           // every lane sees the keys before this one
  int64_t any;           // no lane sees a key from this one on

  Horizon(const Shape& s, const QueryTile& tile) : all(s.Sk), any(0) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      int64_t end = lane < tile.rows ? s.Sk : 0;
      if (lane < tile.rows && s.right < kUnlimited) {
        const int64_t visible = row_of(s, tile, lane).index + s.sequence(0).offset + s.right + 1;
        end = std::clamp<int64_t>(visible, 0, s.Sk);
      }
      if (lane < tile.rows) all = std::min(all, end);
      any = std::max(any, end);
      last[lane] = static_cast<int32_t>(end - 1);
    }
    if (all < any) all = all / kDiagonalKeys * kDiagonalKeys;
  }

  // The block that begins at `first` < any.
  KeyBlock block(int64_t first) const {
    if (first < all) return {first, std::min(kKeys, all - first), 0, false};
    int64_t lane = 0;
    while (*std::max_element(last + lane, last + lane + kLaneGroup) < first) lane += kLaneGroup;
    return {first, std::min(kDiagonalKeys, any - first), lane, true};
  }
};

// ---- work and workspace -------------------------------------------------------------------------

// Threads that are worth waking: each should have a few microseconds of arithmetic.
inline Parallel worthwhile(const Shape& s, const Parallel& parallel) {
  const double products = static_cast<double>(s.B) * s.Hq * s.Sq * s.Sk * (s.D + s.Dv);
  const int threads =
      static_cast<int>(std::min<double>(parallel.threads, 1 + products / (1 << 18)));
  return threads == 1 ? Parallel::serial() : Parallel{parallel.run, threads};
}

// Hands out the workspace piece by piece; over address 0 it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  float* take(int64_t floats) {
    float* piece = reinterpret_cast<float*>(base_ + used_);
    used_ += static_cast<size_t>(padded(floats)) * sizeof(float);
    return piece;
  }
  size_t used() const { return used_; }

 private:
  uintptr_t base_;
  size_t used_ = 0;
};

template <class Scratch>
size_t scratch_bytes(const Shape& s) {
  Arena measure(nullptr);
  Scratch scratch(measure, s);
  static_cast<void>(scratch);
  return measure.used();
}

// A worker's scratch in the forward pass, and in the backward pass; [rows, columns] in 32-bit
// words.
struct ForwardScratch {
  float *q, *x, *k, *v, *o, *max, *sum, *rescale;

  ForwardScratch(Arena& arena, const Shape& s)
      : q(arena.take(s.D * kLanes)),
        x(arena.take(kKeys * kLanes)),
        k(arena.take(kKeys * s.D)),
        v(arena.take(kKeys * s.Dv)),
        o(arena.take(padded(s.Dv) * kLanes)),
        max(arena.take(kLanes)),
        sum(arena.take(kLanes)),
        rescale(arena.take(kLanes)) {}
};

// Few enough rows for cpu_decode.h: a tile would leave most of its lanes empty.
constexpr int64_t kDecodeRows = 5;
inline bool decodes(const Shape& s) { return rows_of_group(s) <= kDecodeRows; }

struct DecodeScratch {
  float *q, *x;

  DecodeScratch(Arena& arena, const Shape& s)
      : q(arena.take(kDecodeRows * padded(s.D))), x(arena.take(kKeys)) {}
};

// A row's results over a span of keys, within the results [rows, floats] of a task.
struct DecodeRow {
  float *max, *sum, *o;

  DecodeRow(const Shape& s, float* results, int64_t row)
      : max(results + row * floats(s)), sum(max + 1), o(max + 16) {}
  static int64_t floats(const Shape& s) { return 16 + padded(s.Dv); }
};

// Spans of keys a head is cut into: one where there are heads enough for the threads.
inline int64_t decode_spans(const Shape& s, int threads) {
  constexpr int64_t kLeastKeys = 256;  // in a span
  const int64_t heads = std::max<int64_t>(s.B * s.Hkv, 1);
  return std::clamp<int64_t>(ceil_div(threads, heads), 1, std::max<int64_t>(1, s.Sk / kLeastKeys));
}

inline size_t spans_workspace(const Shape& s, int threads) {
  const int64_t results = std::max<int64_t>(threads, s.B * s.Hkv * decode_spans(s, threads));
  return scratch_bytes<DecodeScratch>(s) * static_cast<size_t>(threads) +
         static_cast<size_t>(results * rows_of_group(s) * DecodeRow::floats(s)) * sizeof(float);
}

struct BackwardScratch {
  float *q, *dout, *q_rows, *dout_rows, *p, *ds, *ds_pairs, *k, *k_columns, *v, *dq, *lse, *delta;

  BackwardScratch(Arena& arena, const Shape& s)
      : q(arena.take(s.D * kLanes)),
        dout(arena.take(s.Dv * kLanes)),
        q_rows(arena.take(kLanes * padded(s.D))),
        dout_rows(arena.take(kLanes * padded(s.Dv))),
        p(arena.take(kKeys * kLanes)),
        ds(arena.take(kKeys * kLanes)),
        ds_pairs(arena.take(kKeys / 2 * kLanes)),
        k(arena.take(kKeys * s.D)),
        k_columns(arena.take(kKeys / 2 * s.D)),
        v(arena.take(kKeys * s.Dv)),
        dq(arena.take(padded(s.D) * kLanes)),
        lse(arena.take(kLanes)),
        delta(arena.take(kLanes)) {}
};

// The backward pass goes through a key head's query tiles in `parts` tasks, each with its own sums
// of dk and dv. One task a head is best, unless threads would idle.
inline int64_t backward_parts(const Shape& s, int threads) {
  const int64_t heads = std::max<int64_t>(s.B * s.Hkv, 1);
  const int64_t tiles = ceil_div(rows_of_group(s), kLanes);
  int64_t parts = 1;
  while (parts < tiles && heads * parts < 4 * threads && heads * parts % threads != 0) ++parts;
  return parts;
}

// Floats of one task's sums: dk [Sk, D] and dv [Sk, Dv], rows padded.
inline int64_t sums_floats(const Shape& s) { return s.Sk * (padded(s.D) + padded(s.Dv)); }

// A worker's own sums are enough where each task finishes a head.
inline int64_t sums_count(const Shape& s, int threads) {
  const int64_t parts = backward_parts(s, threads);
  return parts == 1 ? threads : s.B * s.Hkv * parts;
}

}  // namespace bigkern::attention::cpu
