// A blocked matrix product on packed panels, C = A B, with an epilogue on each finished tile.
//
//            N                    B packed once: panels of NR columns, [K][NR] each
//        +---+---+---+
//        |   |   |   | K          A packed by each thread: one block of rows at a time, small
//        +---+---+---+            enough for L2, as panels of MR rows, [K][MR] each
//   K
// +-----+ +---+---+---+           the microkernel makes an MR x NR tile of C in registers over all
// |     | |   |   |   | MR        of K and leaves it in a small array, where the epilogue finds it
// +-----+ +---+---+---+           hot in L1: bias, activation, residual, storing
// |     | |   | C |   |
// +-----+ +---+---+---+
//
// There is no blocking over K outside the microkernel: at 28 fused multiply-adds on 16 lanes for
// every 184 bytes, both panels can come from L2 or L3 without the units ever waiting. Inside, sums
// are cut every kChunk steps, and the parts added up, so that rounding errors grow with
// kChunk + K / kChunk rather than with K.
//
// Included once per instruction set, inside foreach_isa.h; no include guard.

#include "common/cpu/pack.h"

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

constexpr int64_t kChunk = 256;             // words of K summed in one accumulator
constexpr int kAhead = 12;                  // steps of K between a prefetch and its use
constexpr int64_t kBlockBytes = 512 << 10;  // of packed A: half of the L2 cache
constexpr int64_t kMaxBlockPanels = 12;
constexpr int64_t kLeastBlockPanels = 4;  // though they overflow it: B must be reused
constexpr int64_t kGroup = 4;   // panels packed together, kSlab steps of K at a time, so that a
constexpr int64_t kSlab = 128;  // strided matrix is read in whole cache lines and few pages
constexpr size_t kAlign = 64;

// A finished tile of C: rows i .. i + rows, columns j .. j + columns, c[r * NR + column].
struct Tile {
  int64_t i, j;
  int rows, columns;
  const float* c;
  int64_t row_block;  // the block of rows it belongs to: the index of a partial column sum
  bool first;         // nothing of these columns has come from that block yet
};

// tile = A panel x B panel over `words` steps.
template <bool PAIRED>
__attribute__((noinline)) void microkernel(int64_t words, const float* a, const float* b,
                                           float* tile) {
  int64_t begin = 0;
  do {
    const int64_t end = at_most(begin + kChunk, words);
    vf c[MR][NV] = {};
    for (int64_t k = begin; k < end; ++k, a += MR, b += NR) {
      __builtin_prefetch(a + kAhead * MR);
      __builtin_prefetch(b + kAhead * NR);
      if constexpr (NR * sizeof(float) > 64) __builtin_prefetch(b + kAhead * NR + NR / 2);
      vf row[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) row[v] = load(b + v * W);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const vf column = set1(a[r]);
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) {
          c[r][v] =
              PAIRED ? dot_bf16(c[r][v], vi(column), vi(row[v])) : fma(column, row[v], c[r][v]);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        float* out = tile + r * NR + v * W;
        store(out, begin == 0 ? c[r][v] : load(out) + c[r][v]);
      }
    }
    begin = end;
  } while (begin < words);
}

// How C is cut into tasks. Blocks of rows, each a whole number of A panels; when there are too few
// of them for the threads, the columns are cut too.
struct Plan {
  int64_t M, N, K, words;
  int64_t row_blocks, column_blocks;
  int64_t block_panels;  // A panels of the largest block of rows

  int64_t row_panels() const { return (M + MR - 1) / MR; }
  int64_t column_panels() const { return (N + NR - 1) / NR; }
  Slice rows(int64_t block) const { return slice_of(M, MR, block, row_blocks); }
  Slice columns(int64_t block) const { return slice_of(N, NR, block, column_blocks); }
  size_t a_floats() const { return size_t(block_panels * MR * words) + W; }
  size_t b_floats() const { return size_t(column_panels() * NR * words); }
};

inline size_t round_up(size_t x, size_t step) { return (x + step - 1) / step * step; }

// The cheapest cut by a small model: the busiest thread's tiles, and one more column panel for
// packing its rows.
inline Plan make_plan(int64_t M, int64_t N, int64_t K, int64_t words, int threads) {
  Plan best{M, N, K, words, 1, 1, 1};
  const int64_t P = M > 0 ? best.row_panels() : 1, Q = N > 0 ? best.column_panels() : 1;
  const int64_t panel_bytes = MR * int64_t(sizeof(float)) * (words < 1 ? 1 : words);
  int64_t limit = at_most(kBlockBytes / panel_bytes, kMaxBlockPanels);
  if (limit < kLeastBlockPanels) limit = kLeastBlockPanels;
  const int64_t fewest = (P + limit - 1) / limit;
  int64_t best_cost = INT64_MAX;
  for (int64_t columns = 1; columns <= at_most(threads, Q); ++columns) {
    for (int64_t rows = fewest; rows <= at_most(fewest + threads, P); ++rows) {
      const int64_t panels = (P + rows - 1) / rows;
      const int64_t rounds = (rows * columns + threads - 1) / threads;
      const int64_t cost = rounds * panels * ((Q + columns - 1) / columns + 1);
      if (cost >= best_cost) continue;
      best_cost = cost;
      best.row_blocks = rows;
      best.column_blocks = columns;
      best.block_panels = panels;
    }
  }
  return best;
}

// Floats of workspace: packed B, then a block of packed A for each thread.
inline size_t gemm_workspace(const Plan& plan, int threads) {
  return round_up(plan.b_floats(), kAlign) + size_t(threads) * round_up(plan.a_floats(), kAlign);
}

// The rows of one packed block of A times column panels [first, last) of packed B.
template <bool PAIRED, class Epilogue>
void multiply_block(const float* a, Slice rows, const float* b, Slice columns, int64_t words,
                    int64_t row_block, const Epilogue& epilogue) {
  alignas(64) float c[MR * NR];
  for (int64_t j = columns.begin; j < columns.end; j += NR) {
    for (int64_t i = rows.begin; i < rows.end; i += MR) {
      microkernel<PAIRED>(words, a + (i - rows.begin) * words, b + j * words, c);
      epilogue(Tile{i, j, int(at_most(rows.end - i, MR)), int(at_most(columns.end - j, NR)), c,
                    row_block, i == rows.begin});
    }
  }
}

// Packs panels of R rows (of A, or of B's transpose) covering `range`, slab by slab of K:
// pack(i, rows, begin, end, out) writes steps [begin, end) of one panel.
template <int R, class Pack>
void pack_panels(Slice range, int64_t K, int64_t words, float* out, const Pack& pack) {
  for (int64_t first = range.begin; first < range.end; first += kGroup * R) {
    const int64_t last = at_most(range.end, first + kGroup * R);
    for (int64_t k = 0; k < K; k += kSlab) {
      for (int64_t i = first; i < last; i += R) {
        float* panel = out + (i - range.begin) * words;
        pack(i, at_most(range.end - i, R), k, at_most(K, k + kSlab), panel);
      }
    }
  }
}

// All of B, in parallel.
template <class PackB>
void pack_b_panels(const Plan& plan, const PackB& pack_b, float* out, const Parallel& parallel) {
  parallel.for_range(0, plan.column_panels(), 1, [&](int64_t begin, int64_t end) BIGKERN_FN {
    const Slice columns = {begin * NR, at_most(end * NR, plan.N)};
    pack_panels<NR>(columns, plan.K, plan.words, out + columns.begin * plan.words, pack_b);
  });
}

// Runs task(index, worker) for every index below `tasks`, each on the next free thread.
template <class Task>
void run_tasks(int64_t tasks, const Parallel& parallel, const Task& task) {
  int64_t next = 0;
  parallel.for_workers([&](int worker) BIGKERN_FN {
    for (;;) {
      const int64_t index = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (index >= tasks) return;
      task(index, worker);
    }
  });
}

// C = A B. pack_a(i, rows, begin, end, out) and pack_b(j, columns, begin, end, out) write a part of
// a panel in the layout of T (pack.h); epilogue(tile) takes each finished tile, from any thread.
template <class T, class PackA, class PackB, class Epilogue>
void gemm(const Plan& plan, const PackA& pack_a, const PackB& pack_b, const Epilogue& epilogue,
          float* workspace, const Parallel& parallel) {
  float* packed_b = workspace;
  float* packed_a = workspace + round_up(plan.b_floats(), kAlign);
  pack_b_panels(plan, pack_b, packed_b, parallel);
  const auto task = [&](int64_t index, int worker) BIGKERN_FN {
    const int64_t row_block = index / plan.column_blocks;
    const Slice rows = plan.rows(row_block);
    const Slice columns = plan.columns(index % plan.column_blocks);
    float* a = packed_a + size_t(worker) * round_up(plan.a_floats(), kAlign);
    pack_panels<MR>(rows, plan.K, plan.words, a, pack_a);
    multiply_block<paired<T>>(a, rows, packed_b, columns, plan.words, row_block, epilogue);
  };
  run_tasks(plan.row_blocks * plan.column_blocks, parallel, task);
}

// Packs a matrix in memory: PackMatrix<MR>{A}, and PackMatrix<NR>{B^T} for B.
template <int R, class T>
struct PackMatrix {
  Matrix<T> m;
  void operator()(int64_t i, int64_t rows, int64_t begin, int64_t end, float* out) const {
    pack_panel<R>(m, i, rows, begin, end, out);
  }
};

// The same for matrices in memory with any strides: A is [M, K], B is [K, N].
template <class T, class Epilogue>
void gemm(const Plan& plan, const Matrix<T>& A, const Matrix<T>& B, const Epilogue& epilogue,
          float* workspace, const Parallel& parallel) {
  gemm<T>(plan, PackMatrix<MR, T>{A}, PackMatrix<NR, T>{B.transposed()}, epilogue, workspace,
          parallel);
}

// The plainest epilogue: C (+)= tile, C row-major with leading dimension `row`.
template <class T>
struct StoreTile {
  T* C;
  int64_t row;
  bool accumulate;

  void operator()(const Tile& tile) const {
    for (int r = 0; r < tile.rows; ++r) {
      T* out = C + (tile.i + r) * row + tile.j;
      for (int64_t j = 0; j < tile.columns; j += W) {
        const int64_t n = at_most(tile.columns - j, W);
        vf c = load(tile.c + r * NR + j);
        if (accumulate) c += n == W ? load(out + j) : load_n(out + j, n);
        n == W ? store(out + j, c) : store_n(out + j, c, n);
      }
    }
  }
};

}  // namespace
}  // namespace bigkern::BIGKERN_ISA
