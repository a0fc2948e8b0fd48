// Packing: matrices rewritten in the order in which the GEMM's inner loop reads them.
//
// A panel is R rows of A (or R columns of B) over all of K, laid out [K][R], so that each step of
// the inner loop reads R neighbouring values. Where the level has dot_bf16, two bf16 neighbours
// along K share one 32-bit word and a panel is [K/2][R] words; everything else is widened to float.
//
//   rows, k contiguous                 panel, R = 4
//   a0 a1 a2 ..                        a0 b0 c0 d0
//   b0 b1 b2 ..      transpose W x W   a1 b1 c1 d1
//   c0 c1 c2 ..      ------------->    a2 b2 c2 d2
//   d0 d1 d2 ..                        ..
//
// The packers read through a functor, so that a transformation (a normalisation, an activation)
// happens on the way in. Included once per instruction set, inside foreach_isa.h; no include guard.

namespace bigkern::BIGKERN_ISA {
namespace {

// Two values of K in one word?
template <class T>
constexpr bool paired = false;
template <>
constexpr bool paired<bf16> = has_dot_bf16;

// 32-bit words along K.
template <class T>
constexpr int64_t words_of(int64_t k) {
  return paired<T> ? (k + 1) / 2 : k;
}

// block[i][j] becomes block[j][i]: log2(W) perfect shuffles of the rows.
inline void transpose(vf (&block)[W]) {
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    vf next[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = interleave_low(block[i], block[i + W / 2]);
      next[2 * i + 1] = interleave_high(block[i], block[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) block[i] = next[i];
  }
}

// The first COUNT lanes, and not a byte beyond them.
template <int COUNT>
inline void store_first(float* p, vf x) {
  if constexpr (COUNT >= W) {
    store(p, x);
  } else if constexpr (BIGKERN_LEVEL >= 2) {
    store_n(p, x, COUNT);
  } else {
    memcpy(p, &x, COUNT * sizeof(float));
  }
}

// 2W bf16 in K order as W words.
inline vf pair_along(vf first, vf second) {
  const vh halves[2] = {narrow_bf16(first), narrow_bf16(second)};
  return load_raw<vf>(halves);
}

// W words, each one bf16 of an even k and its odd neighbour.
inline vf pair_across(vf even, vf odd) {
  return vf(__builtin_convertvector(narrow_bf16(even), vu) |
            (__builtin_convertvector(narrow_bf16(odd), vu) << 16));
}

inline int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }

// A block of W rows and W words, into COUNT columns of the next `words` words of a panel.
template <int R, int COUNT>
__attribute__((noinline)) void store_transposed(vf (&block)[W], int64_t words, float* out) {
  transpose(block);
  for (int64_t i = 0; i < words; ++i) store_first<COUNT>(out + i * R, block[i]);
}

// Steps [begin, end) of one panel, from rows along which k is contiguous: row(i, k, n) gives n <= W
// values from k on of row i, 0 <= i < rows <= R, with zeros beyond n. Missing rows become zeros.
template <int R, class T, int FIRST = 0, class Row>
void pack_rows(int64_t rows, int64_t begin, int64_t end, float* out, const Row& row) {
  constexpr int COUNT = R - FIRST < W ? R - FIRST : W;  // this pass packs rows FIRST .. FIRST+COUNT
  const int64_t present = at_most(rows - FIRST, COUNT);
  constexpr int64_t step = paired<T> ? 2 * W : W;
  for (int64_t k = begin; k < end; k += step) {
    const int64_t left = end - k;
    vf block[W];
#pragma GCC unroll 1
    for (int i = 0; i < W; ++i) {
      if (i >= present) {
        block[i] = zero();
      } else if constexpr (paired<T>) {
        const vf head = row(FIRST + i, k, at_most(left, W));
        const vf tail = left > W ? row(FIRST + i, k + W, at_most(left - W, W)) : zero();
        block[i] = pair_along(head, tail);
      } else {
        block[i] = row(FIRST + i, k, at_most(left, W));
      }
    }
    float* to = out + words_of<T>(k) * R + FIRST;
    store_transposed<R, COUNT>(block, at_most(words_of<T>(left), W), to);
  }
  if constexpr (FIRST + W < R) pack_rows<R, T, FIRST + W>(rows, begin, end, out, row);
}

// The same from columns along which the panel's rows are contiguous: column(k, i, n) gives n <= W
// values of column k, rows i .. i + n, with zeros beyond n.
template <int R, class T, class Column>
void pack_columns(int64_t rows, int64_t begin, int64_t end, float* out, const Column& column) {
  constexpr int64_t step = paired<T> ? 2 : 1;
  out += words_of<T>(begin) * R;
  for (int64_t k = begin; k < end; k += step, out += R) {
    const auto pack = [&](int64_t first, int64_t count) BIGKERN_FN {
      const int64_t n = at_most(rows - first, count);
      if (n <= 0) return zero();
      const vf word = column(k, first, n);
      if constexpr (!paired<T>) return word;
      return pair_across(word, k + 1 < end ? column(k + 1, first, n) : zero());
    };
    int64_t first = 0;
    for (; first + W <= R; first += W) store(out + first, pack(first, W));
    if constexpr (R % W != 0) store_first<R % W>(out + first, pack(first, R % W));
  }
}

// A matrix in memory: element (i, j) at data[i * row + j * column], any strides.
template <class T>
struct Matrix {
  const T* data;
  int64_t row, column;
  Matrix transposed() const { return {data, column, row}; }
};

// Steps [begin, end) of the panel of rows i0 .. i0 + rows of m, whatever its strides.
template <int R, class T>
void pack_panel(const Matrix<T>& m, int64_t i0, int64_t rows, int64_t begin, int64_t end,
                float* out) {
  const T* base = m.data + i0 * m.row;
  if (m.column == 1) {
    pack_rows<R, T>(rows, begin, end, out, [&](int64_t i, int64_t k, int64_t n) BIGKERN_FN {
      const T* p = base + i * m.row + k;
      return n == W ? load(p) : load_n(p, n);
    });
  } else if (m.row == 1) {
    pack_columns<R, T>(rows, begin, end, out, [&](int64_t k, int64_t i, int64_t n) BIGKERN_FN {
      const T* p = base + k * m.column + i;
      return n == W ? load(p) : load_n(p, n);
    });
  } else {
    pack_columns<R, T>(rows, begin, end, out, [&](int64_t k, int64_t i, int64_t n) BIGKERN_FN {
      float lane[W] = {};
      for (int64_t r = 0; r < n; ++r) lane[r] = to_float(base[(i + r) * m.row + k * m.column]);
      return load(lane);
    });
  }
}

}  // namespace
}  // namespace bigkern::BIGKERN_ISA
