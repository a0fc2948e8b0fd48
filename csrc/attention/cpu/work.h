// How the CPU kernels share a call among threads, and where each finds its scratch: nothing that an
// instruction set changes.
//
// The work on a sequence comes in units: in the forward pass a tile of queries, in the backward
// pass a key head, whose gradients then have one owner. Where there are too few units for the
// threads, or one is too large for them, a unit is done in parts (of its keys, of its tiles); their
// results are put together afterwards, always in the same order.
//
//   workspace   | shares [B + 1] | scratch of each worker ... | results of parts ... |
#pragma once

#include <cmath>

#include "attention/cpu/plan.h"

namespace bigkern::attention::cpu {

// ---- shares and tasks ---------------------------------------------------------------------------

// What a sequence takes of all tasks: units of each of its key heads, parts of each unit.
struct Share {
  int64_t units, parts;
  int64_t task, result;  // where its own begin; a unit of one part leaves no result behind

  int64_t unit_results() const { return parts == 1 ? 0 : parts; }
};

struct Task {
  int64_t batch, kv_head, unit, part;
  int64_t result;  // of this part
};

// Numbers tasks and results; the entry behind the last sequence says how many there are.
inline void number_tasks(const Shape& s, Share* shares) {
  int64_t task = 0, result = 0;
  for (int64_t b = 0; b <= s.B; ++b) {
    shares[b].task = task, shares[b].result = result;
    if (b == s.B) break;
    task += s.Hkv * shares[b].units * shares[b].parts;
    result += s.Hkv * shares[b].units * shares[b].unit_results();
  }
}

inline Task task_at(const Shape& s, const Share* shares, int64_t index) {
  const auto before = [](int64_t i, const Share& share) { return i < share.task; };
  const Share* share = std::upper_bound(shares, shares + s.B, index, before) - 1;
  const int64_t unit = (index - share->task) / share->parts;
  const int64_t part = (index - share->task) % share->parts;
  return {share - shares, unit / share->units, unit % share->units, part,
          share->result + unit * share->unit_results() + part};
}

// Parts of a unit that is `work` of all the `total`: where threads cannot have as many units each,
// so many that no part is more than half of a thread's work. Units in parts have fewer than
// 4 threads parts together.
inline int64_t parts_of(double work, double total, int threads, int64_t most) {
  if (threads == 1 || work == 0 || std::fmod(total / work, threads) == 0) return 1;
  const double parts = std::ceil(2 * threads * work / total);
  return static_cast<int64_t>(std::clamp<double>(parts, 1, std::max<double>(1, double(most))));
}

// Keys that a tile of queries looks at: an estimate.
inline int64_t keys_in_sight(const Shape& s, const Sequence& sequence) {
  return std::min(sequence.Sk, s.left + s.right + kLanes);
}

// Threads that are worth waking: each should have a few microseconds of arithmetic.
template <class SequenceOf>
int useful_threads(const Shape& s, int threads, const SequenceOf& sequence_of) {
  double products = 0;
  for (int64_t b = 0; b < s.B; ++b) {
    const Sequence sequence = sequence_of(b);
    products +=
        double(s.Hq * sequence.Sq) * double(keys_in_sight(s, sequence)) * double(s.D + s.Dv);
  }
  return static_cast<int>(std::min<double>(threads, 1 + products / (1 << 18)));
}

// ---- the forward pass ---------------------------------------------------------------------------

// The rows of a tile: fewer than 64 where that would leave threads without work.
inline int64_t rows_per_tile(const Decode& call, int threads) {
  const Shape& s = call.shape;
  for (int64_t rows = kLanes; rows > kLaneGroup; rows /= 2) {
    int64_t tiles = 0;
    for (int64_t b = 0; b < s.B; ++b)
      tiles += s.Hkv * ceil_div(rows_of(s, sequence_of(call, b)), rows);
    if (tiles >= threads) return rows;
  }
  return kLaneGroup;
}

inline void share_forward(const Decode& call, int64_t rows, int threads, Share* shares) {
  constexpr int64_t kLeastKeys = 256;  // of a part
  const Shape& s = call.shape;
  double total = 0;
  for (int64_t b = 0; b < s.B; ++b) {
    const Sequence sequence = sequence_of(call, b);
    shares[b].units = ceil_div(rows_of(s, sequence), rows);
    total += double(s.Hkv * shares[b].units) * double(keys_in_sight(s, sequence));
  }
  for (int64_t b = 0; b < s.B; ++b) {
    const int64_t keys = keys_in_sight(s, sequence_of(call, b));
    shares[b].parts = parts_of(double(keys), total, threads, keys / kLeastKeys);
  }
  number_tasks(s, shares);
}

// ---- the backward pass --------------------------------------------------------------------------

inline double backward_work(const Shape& s, const Sequence& sequence) {
  return double(rows_of(s, sequence)) * double(keys_in_sight(s, sequence));
}

inline double backward_work(const Shape& s) {
  double total = 0;
  for (int64_t b = 0; b < s.B; ++b) total += double(s.Hkv) * backward_work(s, s.sequence(b));
  return total;
}

inline Share backward_share(const Shape& s, int64_t b, double total, int threads) {
  const Sequence sequence = s.sequence(b);
  const int64_t tiles = ceil_div(rows_of(s, sequence), kLanes);
  return {1, parts_of(backward_work(s, sequence), total, threads, tiles), 0, 0};
}

inline int64_t longest_keys(const Shape& s) {
  int64_t longest = 0;
  for (int64_t b = 0; b < s.B; ++b) longest = std::max(longest, s.sequence(b).Sk);
  return longest;
}

// Floats of a part's sums: dk [Sk, D] and dv [Sk, Dv], rows padded.
inline int64_t sums_floats(const Shape& s, int64_t Sk) { return Sk * (padded(s.D) + padded(s.Dv)); }

// ---- workspace ----------------------------------------------------------------------------------

// Hands out memory piece by piece; over address 0 it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <class T = float>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += static_cast<size_t>(padded(count)) * sizeof(T);
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
  const Scratch scratch(measure, s);
  static_cast<void>(scratch);
  return measure.used();
}

// A worker's scratch for a tile of queries; [rows, columns] in 32-bit words.
struct TileScratch {
  float *q, *x, *kept, *k, *v, *o, *max, *sum, *rescale;

  TileScratch(Arena& arena, const Shape& s)
      : q(arena.take(s.D * kLanes)),
        x(arena.take(kKeys * kLanes)),
        kept(arena.take(s.dropout.active() ? kKeys * kLanes : 0)),
        k(arena.take(kKeys * s.D)),
        v(arena.take(kKeys * s.Dv)),
        o(arena.take(padded(s.Dv) * kLanes)),
        max(arena.take(kLanes)),
        sum(arena.take(kLanes)),
        rescale(arena.take(kLanes)) {}
};

// A row's results over some of its keys: o is still to be divided by sum.
struct RowResult {
  float *max, *sum, *o;

  RowResult(const Shape& s, float* results, int64_t row)
      : max(results + row * floats(s)), sum(max + 1), o(max + 16) {}
  static int64_t floats(const Shape& s) { return 16 + padded(s.Dv); }
};

// The same for a few rows.
struct RowsScratch {
  float *q, *x, *results;

  RowsScratch(Arena& arena, const Shape& s)
      : q(arena.take(kFewRows * padded(s.D))),
        x(arena.take(kKeys)),
        results(arena.take(kFewRows * RowResult::floats(s))) {}
};

struct ForwardWorkspace {
  Share* shares;
  char* scratch;
  size_t worker_bytes;
  float* results;  // [parts][rows of a tile][RowResult::floats]
  size_t bytes;

  ForwardWorkspace(void* base, const Shape& s, int threads) {
    Arena arena(base);
    worker_bytes = std::max(scratch_bytes<TileScratch>(s), scratch_bytes<RowsScratch>(s));
    shares = arena.take<Share>(s.B + 1);
    scratch = arena.take<char>(static_cast<int64_t>(worker_bytes) * threads);
    results = arena.take(threads == 1 ? 0 : 4 * threads * kLanes * RowResult::floats(s));
    bytes = arena.used();
  }
  Arena of_worker(int worker) const {
    return Arena(scratch + worker_bytes * static_cast<size_t>(worker));
  }
  float* result(const Shape& s, int64_t index) const {
    return results + index * kLanes * RowResult::floats(s);
  }
};

constexpr int64_t kBiasKeys = 256;  // of a task that sums a bias's gradient

struct BackwardScratch {
  float *q, *dout, *q_rows, *dout_rows, *p, *ds, *ds_pairs, *kept, *slope, *k, *k_columns, *v, *dq;
  float *lse, *delta, *dbias;

  BackwardScratch(Arena& arena, const Shape& s)
      : q(arena.take(s.D * kLanes)),
        dout(arena.take(s.Dv * kLanes)),
        q_rows(arena.take(kLanes * padded(s.D))),
        dout_rows(arena.take(kLanes * padded(s.Dv))),
        p(arena.take(kKeys * kLanes)),
        ds(arena.take(kKeys * kLanes)),
        ds_pairs(arena.take(kKeys / 2 * kLanes)),
        kept(arena.take(s.dropout.active() ? kKeys * kLanes : 0)),
        slope(arena.take(s.softcap != 0 ? kKeys * kLanes : 0)),
        k(arena.take(kKeys * s.D)),
        k_columns(arena.take(kKeys / 2 * s.D)),
        v(arena.take(kKeys * s.Dv)),
        dq(arena.take(padded(s.D) * kLanes)),
        lse(arena.take(kLanes)),
        delta(arena.take(kLanes)),
        dbias(arena.take(s.bias.data != nullptr ? kBiasKeys * kLanes : 0)) {}
};

struct BackwardWorkspace {
  Share* shares;
  char* scratch;
  size_t worker_bytes;
  float *worker_sums, *results;  // [workers] and [parts], sums_floats each
  int64_t sums;                  // floats of the longest
  size_t bytes;

  BackwardWorkspace(void* base, const Shape& s, int threads) {
    const double total = backward_work(s);
    int64_t parts = 0;
    for (int64_t b = 0; b < s.B; ++b) {
      parts += s.Hkv * backward_share(s, b, total, threads).unit_results();
    }
    Arena arena(base);
    worker_bytes = scratch_bytes<BackwardScratch>(s);
    sums = sums_floats(s, longest_keys(s));
    shares = arena.take<Share>(s.B + 1);
    scratch = arena.take<char>(static_cast<int64_t>(worker_bytes) * threads);
    worker_sums = arena.take(sums * threads);
    results = arena.take(sums * parts);
    bytes = arena.used();
  }
  Arena of_worker(int worker) const {
    return Arena(scratch + worker_bytes * static_cast<size_t>(worker));
  }
};

inline void share_backward(const Shape& s, int threads, Share* shares) {
  const double total = backward_work(s);
  for (int64_t b = 0; b < s.B; ++b) shares[b] = backward_share(s, b, total, threads);
  number_tasks(s, shares);
}

}  // namespace bigkern::attention::cpu
