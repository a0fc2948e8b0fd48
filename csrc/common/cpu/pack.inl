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
// happens on the way in. Compiled once per instruction set.

#include "common/cpu/vec_int8.inl"

namespace bigkern::BIGKERN_ISA {
namespace {

// The first n values of a vector, n >= W standing for all; of nothing, `otherwise`.
template <class T>
inline vf load_upto(const T* p, int64_t n) {
  return n >= W ? load(p) : load_n(p, n);
}
template <class T>
inline void store_upto(T* p, vf x, int64_t n) {
  n >= W ? store(p, x) : store_n(p, x, n);
}
template <class T>
inline vf load_or(const T* p, int64_t offset, int64_t n, float otherwise) {
  return p ? load_upto(p + offset, n) : set1(otherwise);
}

// Calls f with a value of the storage type, which only names it.
template <class F>
inline auto with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::bf16:
      return f(bf16{});
    case Dtype::f16:
      return f(fp16{});
    default:
      return f(float{});
  }
}

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

// block[i][j] becomes block[j][i].
#if BIGKERN_LEVEL >= 2
// First 4 x 4 blocks within the 128-bit lanes, then the lanes: 64 shuffles that overwrite nothing.
inline __attribute__((always_inline)) void transpose(vf (&block)[W]) {
  __m512 r[W], t[W];
#pragma GCC unroll 8
  for (int i = 0; i < W; i += 2) {
    t[i] = _mm512_maskz_unpacklo_ps(0xffff, __m512(block[i]), __m512(block[i + 1]));
    t[i + 1] = _mm512_maskz_unpackhi_ps(0xffff, __m512(block[i]), __m512(block[i + 1]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < W; i += 4) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512d a = __m512d(t[i + half]), b = __m512d(t[i + 2 + half]);
      r[i + 2 * half] = __m512(_mm512_maskz_unpacklo_pd(0xff, a, b));
      r[i + 2 * half + 1] = __m512(_mm512_maskz_unpackhi_pd(0xff, a, b));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_maskz_shuffle_f32x4(0xffff, r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_maskz_shuffle_f32x4(0xffff, r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_maskz_shuffle_f32x4(0xffff, r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_maskz_shuffle_f32x4(0xffff, r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    block[i] = vf(_mm512_maskz_shuffle_f32x4(0xffff, t[i], t[i + 8], 0x88));
    block[i + 8] = vf(_mm512_maskz_shuffle_f32x4(0xffff, t[i], t[i + 8], 0xdd));
  }
}
#else
// log2(W) perfect shuffles of the rows.
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
#endif

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
  const vh halves[2] = {operand_bf16(first), operand_bf16(second)};
  return load_raw<vf>(halves);
}

constexpr int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }

// A block of W rows and W words, into COUNT columns of the next `words` words of a panel.
template <int R, int COUNT>
inline void store_transposed(vf (&block)[W], int64_t words, float* out) {
  transpose(block);
  if (words == W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) store_first<COUNT>(out + i * R, block[i]);
  } else {
    for (int64_t i = 0; i < words; ++i) store_first<COUNT>(out + i * R, block[i]);
  }
}

// ---- words: what the functors below give
// ---------------------------------------------------------

// Along K: up to W words of n elements from p on, as they are stored.
template <class T>
inline vf words_along(const T* p, int64_t n) {
  if constexpr (!paired<T>) {
    return n >= W ? load(p) : load_n(p, n);
  } else {
    if (n >= 2 * W) return load_raw<vf>(p);
    const vh halves[2] = {load_halves_n(p, at_most(n, W)),
                          n > W ? load_halves_n(p + W, n - W) : vh{}};
    return load_raw<vf>(halves);
  }
}

// The same of a matrix that comes from memory: the line of 512 bytes further on is asked for now.
template <class T>
inline vf words_streamed(const T* p, int64_t n) {
  __builtin_prefetch(p + 512 / sizeof(T));
  return words_along(p, n);
}

// The same of computed values: f(k, n) gives n <= W floats from k on, zeros beyond n.
template <class T, class F>
inline vf words_along(int64_t k, int64_t n, const F& f) {
  if constexpr (!paired<T>) {
    return f(k, at_most(n, W));
  } else {
    return pair_along(f(k, at_most(n, W)), n > W ? f(k + W, n - W) : zero());
  }
}

// Across K: one word of each of n <= W rows, at p and, where it belongs to the same word and
// exists, at `next`; null where it does not exist.
template <class T>
inline vf words_across(const T* p, const T* next, int64_t n) {
  if constexpr (!paired<T>) {
    return n >= W ? load(p) : load_n(p, n);
  } else {
    const auto half = [&](const T* q) BIGKERN_FN {
      return __builtin_convertvector(n >= W ? load_raw<vh>(q) : load_halves_n(q, n), vu);
    };
    return vf(next ? half(p) | (half(next) << 16) : half(p));
  }
}

// The same of computed values: f(k, n) gives those of column k.
template <class T, class F>
inline vf words_across(int64_t k, bool has_next, int64_t n, const F& f) {
  if constexpr (!paired<T>) {
    return f(k, n);
  } else {
    return pair_across(f(k, n), has_next ? f(k + 1, n) : zero());
  }
}

// ---- panels -------------------------------------------------------------------------------------

// Steps [begin, end) of one panel, from rows along which k is contiguous: row(i, k, n) gives the
// words of elements k .. k + n of row i, 0 <= i < rows <= R. Missing rows become zeros.
template <int R, class T, int FIRST = 0, class Row>
void pack_rows(int64_t rows, int64_t begin, int64_t end, float* out, const Row& row) {
  constexpr int COUNT = R - FIRST < W ? R - FIRST : W;  // this pass packs rows FIRST .. FIRST+COUNT
  const int64_t present = at_most(rows - FIRST, COUNT);
  constexpr int64_t step = paired<T> ? 2 * W : W;
  for (int64_t k = begin; k < end; k += step) {
    const int64_t n = at_most(end - k, step);
    vf block[W];
    if (present == COUNT && n == step) {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) block[i] = i < COUNT ? row(FIRST + i, k, step) : zero();
    } else {
#pragma GCC unroll 1
      for (int i = 0; i < W; ++i) block[i] = i < present ? row(FIRST + i, k, n) : zero();
    }
    store_transposed<R, COUNT>(block, words_of<T>(n), out + words_of<T>(k - begin) * R + FIRST);
  }
  if constexpr (FIRST + W < R) pack_rows<R, T, FIRST + W>(rows, begin, end, out, row);
}

// The same from columns along which the panel's rows are contiguous: column(k, has_next, i, n)
// gives the words of rows i .. i + n, n <= W, that begin at column k; has_next says that column
// k + 1 exists.
template <int R, class T, class Column>
void pack_columns(int64_t rows, int64_t begin, int64_t end, float* out, const Column& column) {
  constexpr int64_t step = paired<T> ? 2 : 1;
  int64_t k = begin;
  for (; rows == R && k + step <= end; k += step, out += R) {
    int i = 0;
#pragma GCC unroll 4
    for (; i + W <= R; i += W) store(out + i, column(k, true, i, W));
    if constexpr (R % W != 0) store_first<R % W>(out + i, column(k, true, i, R % W));
  }
  for (; k < end; k += step, out += R) {
    const auto words = [&](int64_t i, int64_t count) BIGKERN_FN {
      const int64_t n = at_most(rows - i, count);
      return n > 0 ? column(k, k + 1 < end, i, n) : zero();
    };
    int64_t i = 0;
    for (; i + W <= R; i += W) store(out + i, words(i, W));
    if constexpr (R % W != 0) store_first<R % W>(out + i, words(i, R % W));
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
      return words_streamed(base + i * m.row + k, n);
    });
  } else if (m.row == 1) {
    const auto column = [&](int64_t k, bool has_next, int64_t i, int64_t n) BIGKERN_FN {
      const T* p = base + k * m.column + i;
      return words_across(p, has_next ? p + m.column : nullptr, n);
    };
    pack_columns<R, T>(rows, begin, end, out, column);
  } else {
    const auto column = [&](int64_t k, bool has_next, int64_t i, int64_t n) BIGKERN_FN {
      const auto gather = [&](int64_t c, int64_t count) BIGKERN_FN {
        float lane[W] = {};
        for (int64_t r = 0; r < count; ++r)
          lane[r] = to_float(base[(i + r) * m.row + c * m.column]);
        return load(lane);
      };
      return words_across<T>(k, has_next, n, gather);
    };
    pack_columns<R, T>(rows, begin, end, out, column);
  }
}

}  // namespace
}  // namespace bigkern::BIGKERN_ISA
