// Moving tiles between tensors and scratch: widening, pairing and transposing. Compiled once per
// instruction set.

#include <cstring>
#include <type_traits>

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "attention/cpu/product.inl"
#endif

namespace bigkern::attention::BIGKERN_ISA {
namespace {

// What a product of T multiplies: pairs of bf16 where the level has vdpbf16ps, else floats.
template <class T>
using Element = std::conditional_t<paired<T>, Pair, float>;

// A matrix as the left side of a product: element (m, k) at data[m * row + k * column].
template <class E>
struct Left {
  const E* data;
  int64_t row, column;
};

// n <= W elements, the others zero.
template <class T>
ATTENTION_INLINE vf load_some(const T* p, int64_t n) {
  return n >= W ? load(p) : load_n(p, n);
}
template <class T>
ATTENTION_INLINE void store_some(T* p, vf x, int64_t n) {
  n >= W ? store(p, x) : store_n(p, x, n);
}

// e^x for x <= 1; flushes to 0 below e^-87, keeps NaN. 1 ulp.
ATTENTION_INLINE vf exp_flush(vf x) {
  constexpr float c[] = {4.999999341e-01f, 1.666652011e-01f, 4.166839426e-02f, 8.368780623e-03f,
                         1.381446476e-03f};
  x = max(set1(-88.0f), x);
  const vf shifted =
      fma(x, set1(1.44269504f), set1(round_magic));  // the low bits are n = round(x / ln2)
  const vf n = shifted - round_magic;
  vf r = fma(n, set1(-0.693359375f), x);  // ln2 in two parts, the first exact in 10 bits
  r = fma(n, set1(2.12194440e-4f), r);
  const vf power = vf((vi(shifted) << 23) + (127 << 23));  // 2^n; 2^-127 comes out as 0
  return (fma(r * r, polynomial(r, c), r) + 1.0f) * power;
}

// Keys as rows: element (key, d) for a product over d.
template <class T>
Left<Element<T>> key_rows(const T* keys, int64_t stride, int64_t n, int64_t D, float* scratch) {
  if constexpr (std::is_same_v<T, float>) {
    return {keys, stride, 1};
  } else if constexpr (paired<T>) {
    const int64_t words = words_of<T>(D);
    for (int64_t j = 0; j < n; ++j) {
      scratch[j * words + words - 1] = 0;  // the other half of an odd last pair
      memcpy(scratch + j * words, keys + j * stride, static_cast<size_t>(D) * sizeof(T));
    }
    return {reinterpret_cast<const Pair*>(scratch), words, 1};
  } else {
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t d = 0; d < D; d += W) {
        const vf x = load_some(keys + j * stride + d, D - d);
        store_some(scratch + j * D + d, x, D - d);
      }
    }
    return {scratch, D, 1};
  }
}

// Rows 2r and 2r + 1 of a bf16 matrix side by side: [ceil(n / 2), row] words, zeros up to `row`
// columns.
template <class RowAt>
void pair_rows(int64_t n, int64_t D, int64_t row, float* out, const RowAt& row_at) {
  for (int64_t r = 0; r < n; r += 2, out += row) {
    const bf16* even = row_at(r);
    const bf16* odd = r + 1 < n ? row_at(r + 1) : nullptr;
    for (int64_t d = 0; d < row; d += W) {
      const vf words = d < D ? words_across(even + d, odd ? odd + d : nullptr, D - d) : zero();
      store_some(out + d, words, row - d);
    }
  }
}

// Keys as columns: element (d, key) for a product over keys.
template <class T>
Left<Element<T>> key_columns(const T* keys, int64_t stride, int64_t n, int64_t D, float* scratch) {
  if constexpr (paired<T>) {
    pair_rows(n, D, D, scratch, [&](int64_t j) BIGKERN_FN { return keys + j * stride; });
    return {reinterpret_cast<const Pair*>(scratch), 1, D};
  } else {
    const Left<float> rows = key_rows(keys, stride, n, D, scratch);
    return {rows.data, 1, rows.row};
  }
}

// A tile's rows of a tensor [B, H, S, D].
template <class T>
struct TileRows {
  T* row[kLanes];
  int64_t rows;
};

template <class T, class Pointer>
TileRows<T> tile_rows(const View<Pointer>& x, const QueryTile& tile) {
  TileRows<T> found;
  found.rows = tile.rows;
  for (int64_t lane = 0; lane < tile.rows; ++lane) {
    const Row& row = tile.row[lane];
    found.row[lane] =
        row_at<std::remove_const_t<T>>(x, tile.batch, row.head, tile.sequence.q_begin + row.index);
  }
  return found;
}

// The tile transposed, [words of D, 64]; lanes without a row are zero.
template <class T>
void pack_lanes(const TileRows<const T>& tile, int64_t D, float* out) {
  pack_rows<kLanes, T>(tile.rows, 0, D, out, [&](int64_t lane, int64_t d, int64_t n) BIGKERN_FN {
    return words_along(tile.row[lane] + d, n);
  });
}

// The tile as it is, for products over lanes: [64, padded(D)] floats or [32, padded(D)] pairs.
template <class T>
void pack_lane_rows(const TileRows<const T>& tile, int64_t D, float* out) {
  const int64_t row = padded(D);
  const int64_t rows = padded(tile.rows);
  if constexpr (paired<T>) {
    pair_rows(tile.rows, D, row, out, [&](int64_t lane) BIGKERN_FN { return tile.row[lane]; });
    const int64_t done = (tile.rows + 1) / 2;
    memset(out + done * row, 0, static_cast<size_t>((rows / 2 - done) * row) * sizeof(float));
  } else {
    for (int64_t lane = 0; lane < tile.rows; ++lane) {
      for (int64_t d = 0; d < row; d += W) {
        store(out + lane * row + d, load_some(tile.row[lane] + d, D > d ? D - d : 0));
      }
    }
    memset(out + tile.rows * row, 0, static_cast<size_t>((rows - tile.rows) * row) * sizeof(float));
  }
}

// The transposed tile x [D, 64], each lane times its factor, into the rows of a tensor. x has
// padded(D) rows.
template <class T>
void unpack_lanes(const float* x, const float* factor, int64_t D, const TileRows<T>& tile) {
  for (int64_t lane = 0; lane < tile.rows; lane += W) {
    const vf scale = load(factor + lane);
    for (int64_t d = 0; d < D; d += W) {
      vf block[W];
      for (int i = 0; i < W; ++i) block[i] = load(x + (d + i) * kLanes + lane) * scale;
      transpose(block);
      const int64_t lanes = at_most(tile.rows - lane, W);
      for (int64_t i = 0; i < lanes; ++i) store_some(tile.row[lane + i] + d, block[i], D - d);
    }
  }
}

}  // namespace
}  // namespace bigkern::attention::BIGKERN_ISA
