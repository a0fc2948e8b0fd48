// The inner loop of the matrix product: one tile of C in registers.
//
//             NR = 2 vectors                a step: NR values of B's panel, one of A for each row.
//            +-------+-------+              On 16 lanes 28 multiply-adds, for 56 bytes of A from
//            |  row[0], [1]  |  B           L1 and 128 of B from L2. A word is a float, or two
//            +-------+-------+              bf16 of neighbouring k where the level has dot_bf16.
//     +---+  +-------+-------+
//   A | a |  | c[r][0], [1]  | ROWS rows    B's panel may hold narrower elements than words: they
//     +---+  +-------+-------+              are widened between memory and register.
//
// Few rows have kernels and, if they are all there are, A panels of their own height: A then leaves
// L1 to B. Compiled once per instruction set.

#include "common/cpu/pack.inl"

namespace bigkern::BIGKERN_ISA {
namespace {

// The tile: MR * NV accumulators, NV vectors of B and one of A fill the register file.
#if BIGKERN_LEVEL >= 2
constexpr int MR = 14;  // of 32 registers
#elif defined(__aarch64__)
constexpr int MR = 12;  // of 32
#else
constexpr int MR = 6;  // of 16
#endif
constexpr int NV = 2;
constexpr int NR = NV * W;

constexpr int64_t kTile = MR * NR;
// From a prefetch to its use: steps, and bytes of B's narrow elements, which come from memory.
constexpr int64_t kAhead = 12, kBytesAhead = 3584;

// A number of rows at compile time.
template <int R>
struct Rows {
  static constexpr int value = R;
};

// The heights that there are kernels and panels for, and the least that holds so many rows.
template <class F>
inline void with_height(int64_t height, const F& f) {
  if (height == 1) return f(Rows<1>{});
  if (height == 2) return f(Rows<2>{});
  if (height == 4) return f(Rows<4>{});
  if (MR > 6 && height == 6) return f(Rows<6>{});
  if (MR > 8 && height == 8) return f(Rows<at_most(MR, 8)>{});
  if (MR > 11 && height == 11) return f(Rows<at_most(MR, 11)>{});
  f(Rows<MR>{});
}
inline int64_t fitting_height(int64_t rows) {
  constexpr int64_t heights[] = {1, 2, 4, 6, 8, 11};
  for (const int64_t height : heights) {
    if (rows <= height) return at_most(height, MR);
  }
  return MR;
}

// Elements of a panel of B in one step. The two of a word stand NR apart where they are int8.
template <bool PAIRED, class B>
constexpr int64_t step_of = PAIRED && sizeof(B) == 1 ? 2 * NR : NR;

// W words of a panel of words, or of elements that are widened here.
template <bool PAIRED, class B>
inline __attribute__((always_inline)) vf panel_words(const B* b) {
  if constexpr (PAIRED && sizeof(B) == 1) {
    return pair_exact(load(b), load(b + NR));
  } else {
    return load(b);
  }
}

// The first ROWS rows of tile (+)= A panel x B panel over `words` steps; A's panel has `height`
// rows.
template <bool PAIRED, int ROWS, class B>
__attribute__((noinline)) void microkernel(int64_t words, const float* a, int64_t height,
                                           const B* b, float* tile, bool first) {
  constexpr int64_t step = step_of<PAIRED, B>;
  constexpr int64_t ahead = sizeof(B) == sizeof(float) ? kAhead * step : kBytesAhead / sizeof(B);
  if (!first) {
    for (int64_t i = 0; i < ROWS * NR; i += 16) __builtin_prefetch(tile + i, 1);
  }
  vf c[ROWS][NV] = {};
  for (int64_t k = 0; k < words; ++k, a += height, b += step) {
    __builtin_prefetch(a + kAhead * height);
    __builtin_prefetch(b + ahead);
    if constexpr (step * sizeof(B) > 64) __builtin_prefetch(b + ahead + step / 2);
    vf row[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) row[v] = panel_words<PAIRED>(b + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const vf column = set1(a[r]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        c[r][v] = PAIRED ? dot_bf16(c[r][v], vi(column), vi(row[v])) : fma(column, row[v], c[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      float* out = tile + r * NR + v * W;
      store(out, first ? c[r][v] : load(out) + c[r][v]);
    }
  }
}

// The same for the rows that there are: the last panel of a matrix of 2^n rows is nearly empty.
template <bool PAIRED, class B>
inline void multiply_tile(int64_t rows, int64_t words, const float* a, int64_t height, const B* b,
                          float* tile, bool first) {
  with_height(fitting_height(rows), [&](auto constant) BIGKERN_FN {
    microkernel<PAIRED, decltype(constant)::value>(words, a, height, b, tile, first);
  });
}

}  // namespace
}  // namespace bigkern::BIGKERN_ISA
