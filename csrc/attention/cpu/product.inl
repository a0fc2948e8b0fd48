// The one matrix product of the attention kernels, C[M, N] = A[M, K] B[K, N], for tiles that lie in
// cache. Compiled once per instruction set.
//
// A block of C, 6 rows by 4 vectors (6 by 2 with 16 registers), stays in registers while k runs;
// each step broadcasts one element from each row of A and multiplies it by one row of B. A is read
// where it lies, rows or columns: no packing.
//
//            B[k, :]  v v v v                     an element is a float, or with vdpbf16ps a
//   A[:, k]  a        c c c c                     pair of bf16 that are neighbours along k: then
//            a        c c c c   6 x 4 registers   one step advances k by two
//            ...      .......

#include "attention/cpu/work.h"

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "common/cpu/dropout.inl"
#include "common/cpu/gemm.inl"
#endif

namespace bigkern::attention::BIGKERN_ISA {
using namespace bigkern::BIGKERN_ISA;
using namespace cpu;

namespace {

#define ATTENTION_INLINE inline __attribute__((always_inline))

// Two bf16 with neighbouring k, the even one in the low half.
struct Pair {
  uint32_t bits;
};

ATTENTION_INLINE vf multiply_add(const float* a, const float* b, vf c) {
  return fma(set1(*a), load(b), c);
}
ATTENTION_INLINE vf multiply_add(const Pair* a, const Pair* b, vf c) {
  return dot_bf16(c, set1_int(static_cast<int32_t>(a->bits)), load_raw<vi>(b));
}

// Rows of memory that are wanted next: a product asks for them bit by bit, a share with each of its
// rows. The rows of a head lie far apart, and the hardware foresees none of them.
struct Ahead {
  const char* data = nullptr;
  int64_t row = 0, rows = 0, bytes = 0;

  // The share of steps begin .. end out of all `steps`.
  void ask(int64_t begin, int64_t end, int64_t steps) const {
    for (int64_t r = rows * begin / steps; r < rows * end / steps; ++r) {
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(data + r * row + at, 0, 2);
    }
  }
};

// rows x [rows, columns]
template <class T>
Ahead rows_ahead(const T* x, int64_t row, int64_t rows, int64_t columns) {
  const int64_t size = sizeof(T);
  return {reinterpret_cast<const char*>(x), row * size, rows, columns * size};
}

template <class E>
struct Product {
  int64_t M, K;
  const E* a;
  int64_t a_row, a_column;  // A[m, k] = a[m * a_row + k * a_column]
  const E* b;
  int64_t b_row;  // B[k, n] = b[k * b_row + n]
  float* c;
  int64_t c_row;
  float scale = 1.0f;              // C = scale * A B
  bool add = false;                // C += scale * A B
  const float* rescale = nullptr;  // with add: C = C * rescale[n] + scale * A B
  Ahead ahead = {};
  int64_t chunk = 64;  // steps of k in one sum: rounding errors grow with chunk + K / chunk
};

constexpr int kBlockRows = 6;
constexpr int kBlockVectors = BIGKERN_LEVEL >= 2 ? 4 : 2;

// C[m .. m + R, n .. n + V * W].
template <int R, int V, class E>
ATTENTION_INLINE void block(const Product<E>& p, int64_t m, int64_t n) {
  if (p.ahead.rows > 0) p.ahead.ask(m, m + R, p.M);
  vf acc[R][V] = {};
  const E* a = p.a + m * p.a_row;
  const E* b = p.b + n;
  for (int64_t k = 0; k < p.K; ++k, a += p.a_column, b += p.b_row) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        acc[r][v] = multiply_add(a + r * p.a_row, b + v * W, acc[r][v]);
      }
    }
  }
  float* c = p.c + m * p.c_row + n;
  const vf scale = set1(p.scale);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      vf sum = acc[r][v] * scale;
      if (p.rescale != nullptr) {
        sum = fma(load(c + r * p.c_row + v * W), load(p.rescale + n + v * W), sum);
      } else if (p.add) {
        sum += load(c + r * p.c_row + v * W);
      }
      store(c + r * p.c_row + v * W, sum);
    }
  }
}

template <int V, class E>
void panel(const Product<E>& p, int64_t n) {
  int64_t m = 0;
  for (; m + kBlockRows <= p.M; m += kBlockRows) block<kBlockRows, V>(p, m, n);
  for (; m + 4 <= p.M; m += 4) block<4, V>(p, m, n);
  for (; m + 2 <= p.M; m += 2) block<2, V>(p, m, n);
  if (m < p.M) block<1, V>(p, m, n);
}

// Columns begin .. end of C, both multiples of W.
template <class E>
void multiply(Product<E> p, int64_t begin, int64_t end) {
  const int64_t K = p.K;
  int64_t k = 0;
  do {
    p.K = K - k < 2 * p.chunk ? K - k : p.chunk;
    int64_t n = begin;
    for (; n + kBlockVectors * W <= end; n += kBlockVectors * W) {
      panel<kBlockVectors>(p, n);
      p.ahead.rows = 0;
    }
    if (kBlockVectors > 2 && n + 2 * W <= end) {
      panel<2>(p, n);
      n += 2 * W;
    }
    if (n < end) panel<1>(p, n);
    p.a += p.K * p.a_column;
    p.b += p.K * p.b_row;
    p.add = true;
    p.rescale = nullptr;
    p.ahead.rows = 0;
    k += p.K;
  } while (k < K);
}

}  // namespace
}  // namespace bigkern::attention::BIGKERN_ISA
