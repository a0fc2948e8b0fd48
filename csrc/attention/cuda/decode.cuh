// What attention's decode kernels are made of: how a call is shared out, rows of the cache, and
// partial results.
#pragma once

#include "attention/cuda/product.cuh"
#include "attention/cuda/softmax.cuh"

namespace bigkern::attention::cuda {

constexpr int kDecodeWarps = 4, kDecodeThreads = kDecodeWarps * kWarpSize;

// A call, and how it is shared out.
struct DecodeWork {
  Decode call;
  int strips;  // of 16 rows that a block has: 1, 2 or 4
  int tiles;   // blocks that the rows of one key head take
  int spans;   // of a sequence's keys, at most
  int keys;    // a span's length is a multiple of it
};

// The rows of a key head: row r is query r % Sq of the group's head r / Sq.
BIGKERN_HD int64_t rows_of_group(const Shape& shape) { return shape.Hq / shape.Hkv * shape.Sq; }

// What a lane has to know of one of its two rows.
struct DecodeRow {
  Range seen = {0, 0};
  int place = 0;  // the key that the query stands at
  float slope = 0.0f, sink = -INFINITY;

  __device__ __forceinline__ DecodeRow(const Shape& shape, const Window& window, int b, int h_kv,
                                       int r) {
    if (r >= rows_of_group(shape)) return;
    const int Sq = int(shape.Sq), i = r % Sq, h = h_kv * int(shape.Hq / shape.Hkv) + r / Sq;
    seen = window.keys_of(i, i + 1);
    place = i + window.offset;
    slope = value_of(shape.slopes, b, h, 0.0f);
    sink = value_of(shape.sinks, b, h, -INFINITY);
  }
};

// ---- keys
// ----------------------------------------------------------------------------------------

__device__ __forceinline__ Window window_of(const Decode& call, int b) {
  const int64_t Sq = call.shape.Sq, length = call.lengths[b];
  return Window(call.shape, Sequence{0, 0, Sq, length, length - Sq});
}

// What one sequence's queries see of its keys, cut into spans. The first span is there even when
// nothing is seen.
struct Spans {
  Range keys;
  int size, count;

  __device__ __forceinline__ Spans(const DecodeWork& work, const Window& window)
      : keys(window.keys_of(0, window.Sq)) {
    const int seen = max(0, keys.end - keys.begin);
    size = max(1, int(ceil_div(ceil_div(seen, work.spans), work.keys))) * work.keys;
    count = max(1, int(ceil_div(seen, size)));
  }
  __device__ __forceinline__ Range at(int span) const {
    const int begin = keys.begin + span * size;
    return {begin, min(keys.end, begin + size)};
  }
};

// One head of a sequence's cached keys or values.
template <class T>
struct Cache {
  const T* data;
  int64_t page, row;
  const int32_t* pages;  // of this sequence; null: its rows lie behind each other
  int page_size;

  __device__ __forceinline__ Cache(const View<const void*>& x, const Pages& all, int b, int h)
      : data(static_cast<const T*>(x.data) + h * x.head),
        page(x.batch),
        row(x.row),
        pages(all.table),
        page_size(int(all.page_size)) {
    if (pages == nullptr) {
      data += b * x.batch;
    } else {
      pages += b * all.row;
    }
  }
  __device__ __forceinline__ const T* at(int j) const {
    if (pages == nullptr) return data + j * row;
    return data + pages[j / page_size] * page + j % page_size * row;
  }
};

// Whether rows, heads, and batches or pages, all begin at multiples of 16 bytes.
template <class T>
__device__ __forceinline__ bool in_vectors(const View<const void*>& x, int64_t columns) {
  const uint64_t bytes = uint64_t(x.batch | x.head | x.row | columns) * sizeof(T);
  return (reinterpret_cast<uint64_t>(x.data) | bytes) % 16 == 0;
}

// Starts copying ROWS rows to a tile; at(row) is where one begins, null for a row of zeros. All
// threads of the block take part; the tile is there after cp_async_wait and a barrier.
template <int ROWS, int D, class T, class At>
__device__ __forceinline__ void gather_tile(T* tile, int64_t columns, bool vectors, At at) {
  if (vectors) {
    constexpr int kAcross = D / kVecWidth<T>, kDown = kDecodeThreads / kAcross;
    static_assert(kDecodeThreads % kAcross == 0 && ROWS % kDown == 0,
                  "some threads would have nothing to copy");
    const int first = threadIdx.x / kAcross, column = threadIdx.x % kAcross * kVecWidth<T>;
#pragma unroll
    for (int down = 0; down < ROWS; down += kDown) {
      const T* const source = at(first + down);
      const bool valid = source != nullptr && column < columns;
      ptx::cp_async_16(tile + (first + down) * kPitch<T, D> + column,
                       valid ? source + column : nullptr, valid);
    }
  } else {
#pragma unroll 1
    for (int n = threadIdx.x; n < ROWS * D; n += kDecodeThreads) {
      const int row = n / D, column = n % D;
      const T* const source = at(row);
      const bool valid = source != nullptr && column < columns;
      tile[row * kPitch<T, D> + column] = valid ? source[column] : from_float<T>(0.0f);
    }
  }
}

// Starts copying the queries of a block, whose first row is row0, to their tile.
template <int ROWS, int D, class T>
__device__ __forceinline__ void load_queries(T* tile, const DecodeWork& work, int b, int h_kv,
                                             int row0) {
  const View<const void*>& q = work.call.q;
  const Shape& shape = work.call.shape;
  const int Sq = int(shape.Sq), group = int(shape.Hq / shape.Hkv);
  gather_tile<ROWS, D>(tile, shape.D, in_vectors<T>(q, shape.D), [&](int row) -> const T* {
    const int r = row0 + row;
    if (row >= 16 * work.strips || r >= group * Sq) return nullptr;
    return static_cast<const T*>(q.data) + b * q.batch + (h_kv * group + r / Sq) * q.head +
           r % Sq * q.row;
  });
}

// Starts copying the keys or values j0 .. j_end - 1 to their tile.
template <int KEYS, int D, class T>
__device__ __forceinline__ void load_cached(T* tile, const Decode& call, const View<const void*>& x,
                                            int64_t columns, int b, int h_kv, int j0, int j_end) {
  const Cache<T> cache(x, call.pages, b, h_kv);
  gather_tile<KEYS, D>(tile, columns, in_vectors<T>(x, columns),
                       [&](int row) { return j0 + row < j_end ? cache.at(j0 + row) : nullptr; });
}

// ---- results
// -------------------------------------------------------------------------------------

// What spans have of each row before they are joined; rows are numbered as in [B, Hq, Sq].
struct Partial {
  float *o, *m, *l;

  __device__ __forceinline__ Partial(const DecodeWork& work, int span) {
    const Shape& shape = work.call.shape;
    const int64_t rows = shape.B * shape.Hq * shape.Sq;
    float* const all_m = static_cast<float*>(work.call.workspace) + work.spans * rows * shape.Dv;
    o = static_cast<float*>(work.call.workspace) + span * rows * shape.Dv;
    m = all_m + span * rows;
    l = all_m + (work.spans + span) * rows;
  }
};

// The sums that several warps or spans have of one row, each relative to its own m, become one.
// They are always added in the same order.
template <class T>
struct Joined {
  const float* parts_m;
  int64_t stride;
  int count;
  float m, l;

  __device__ __forceinline__ Joined(const float* parts_m_, const float* parts_l, int64_t stride_,
                                    int count_)
      : parts_m(parts_m_), stride(stride_), count(count_), m(-INFINITY), l(0.0f) {
    for (int n = 0; n < count; ++n) m = fmaxf(m, parts_m[n * stride]);
    for (int n = 0; n < count; ++n) l += weight(n) * parts_l[n * stride];
  }
  __device__ __forceinline__ float weight(int n) const {
    return exp_of<T>(parts_m[n * stride] - (m == -INFINITY ? 0.0f : m));
  }
  // The sum of what the parts have at x, each `step` floats after the one before.
  __device__ __forceinline__ float sum(const float* x, int64_t step) const {
    float total = 0.0f;
#pragma unroll 4
    for (int n = 0; n < count; ++n) total += weight(n) * x[n * step];
    return total;
  }

  // Stores o and lse of a row; sum_of(column) is what l divides. The whole warp takes part.
  template <class F>
  __device__ __forceinline__ void store(const Decode& call, int64_t row, F sum_of) const {
    const Shape& shape = call.shape;
    const int64_t i = row % shape.Sq, h = row / shape.Sq % shape.Hq, b = row / shape.Sq / shape.Hq;
    const bool empty = m == -INFINITY;
    T* const o = static_cast<T*>(call.o.data) + b * call.o.batch + h * call.o.head + i * call.o.row;
    for (int c = lane(); c < shape.Dv; c += kWarpSize) {
      o[c] = from_float<T>(empty ? 0.0f : sum_of(c) / l);
    }
    if (lane() == 0) {
      call.lse.data[b * call.lse.batch + h * call.lse.head + i] =
          empty ? -INFINITY : m / kUnit<T> + logf(l);
    }
  }
};

}  // namespace bigkern::attention::cuda
