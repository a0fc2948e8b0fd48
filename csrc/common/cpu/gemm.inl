// A blocked matrix product on packed panels, C = A B, with an epilogue on each finished tile.
//
//              group of columns
//           +---+---+---+---+
//           |   |   |   |   | KC   B: packed by the thread that uses it, right before it does: one
//           +---+---+---+---+      group of panels, KC steps of K, in L2. [KC][NR] a panel
//     KC
//   +----+  +---+---+---+---+
//   |    |  |   |   |   |   | MR   A: one block of rows over all of K, as panels of MR rows, packed
//   +----+  +---+---+---+---+      once. A panel's KC steps stay in L1 for all panels of the group
//   |    |  |   | C |   |   |
//   +----+  +---+---+---+---+      C: the block's tiles of the group wait in L2 for the next KC
//   |    |  |   |   |   |   |      steps; after the last ones the epilogue finds a tile hot in L1:
//   +----+  +---+---+---+---+      bias, activation, residual, storing
//
// The microkernel makes an MR x NR tile in registers: 28 multiply-adds on 16 lanes a step, for 56
// bytes of A from L1 and 128 of B from L2. Nothing is ever packed in a pass of its own: what B
// costs is paid once for each block of rows, and is small against 100 rows or more. Sums are cut
// every KC steps, so that rounding errors grow with KC + K / KC rather than with K.
//
// A matrix B that never changes can be kept packed instead (PanelMatrix): its panels are then read
// where they are, in the type they are stored in. With few rows that is all that B costs.
//
// Compiled once per instruction set.

#include "common/cpu/gemm_tile.inl"
#include "common/parallel.h"

namespace bigkern::BIGKERN_ISA {
namespace {

constexpr int64_t KC = 192;              // words of K: A's part of a panel is 10.5 KiB
constexpr int64_t kGroup = 4;            // column panels: B's part is 96 KiB
constexpr int64_t kMaxBlockPanels = 74;  // row panels of a block: C's tiles of a group are 518 KiB
constexpr int64_t kSlab = 256;           // elements of K that are packed at a time
constexpr size_t kAlign = 64;

// A finished tile of C: rows i .. i + rows, columns j .. j + columns, c[r * NR + column].
struct Tile {
  int64_t i, j;
  int rows, columns;
  const float* c;
  int64_t row_block;  // the block of rows it belongs to: the index of a partial column sum
  bool first;         // nothing of these columns has come from that block yet
};

// How C is cut into tasks: blocks of rows, each a whole number of A panels, and of columns.
struct Plan {
  int64_t M, N, K;
  int64_t words;  // 32-bit words along K
  int64_t row_blocks, column_blocks;
  int64_t block_panels;  // A panels of the largest block of rows
  int64_t height;        // of an A panel

  int64_t row_panels() const { return (M + height - 1) / height; }
  int64_t column_panels() const { return (N + NR - 1) / NR; }
  int64_t tasks() const { return row_blocks * column_blocks; }
  Slice rows(int64_t task) const { return slice_of(M, height, task / column_blocks, row_blocks); }
  Slice columns(int64_t task) const { return slice_of(N, NR, task % column_blocks, column_blocks); }
};

inline size_t round_up(size_t x, size_t step) { return (x + step - 1) / step * step; }

// The cheapest cut by a small model, in tenths of a tile of the busiest thread: packing a panel of
// B costs half a tile, one of A a fifth.
inline Plan make_plan(int64_t M, int64_t N, int64_t K, int64_t words, int threads,
                      int64_t height = MR) {
  Plan best{M, N, K, words, 1, 1, 1, height};
  const int64_t P = M > 0 ? best.row_panels() : 1, Q = N > 0 ? best.column_panels() : 1;
  const int64_t fewest = (P + kMaxBlockPanels - 1) / kMaxBlockPanels;
  int64_t best_cost = INT64_MAX;
  for (int64_t columns = 1; columns <= at_most(threads, Q); ++columns) {
    for (int64_t rows = fewest; rows <= at_most(fewest + threads, P); ++rows) {
      const int64_t panels = (P + rows - 1) / rows, width = (Q + columns - 1) / columns;
      const int64_t rounds = (rows * columns + threads - 1) / threads;
      const int64_t cost = rounds * (10 * panels * width + 5 * width + 2 * panels);
      if (cost >= best_cost) continue;
      best_cost = cost;
      best.row_blocks = rows;
      best.column_blocks = columns;
      best.block_panels = panels;
    }
  }
  return best;
}

// A thread's workspace: its block of packed A, its group of packed B, and their tiles of C.
struct Scratch {
  float *b, *c, *a;

  static size_t floats(int64_t panels, int64_t words) {
    return round_up(size_t(kGroup * (NR * KC + panels * kTile) + panels * MR * words), kAlign);
  }
  Scratch(int64_t panels, float* workspace)
      : b(workspace), c(b + kGroup * NR * KC), a(c + kGroup * panels * kTile) {}
};

inline size_t gemm_workspace(const Plan& plan, int threads) {
  return size_t(threads) * Scratch::floats(plan.block_panels, plan.words);
}

// Packs a block of rows over all of K, a slab of K at a time, so that a matrix that lies the other
// way is read in whole cache lines and few pages.
template <class T, class Pack>
void pack_block(Slice rows, int64_t K, int64_t height, float* out, const Pack& pack) {
  const int64_t words = words_of<T>(K);
  for (int64_t k = 0; k < K; k += kSlab) {
    float* panel = out + words_of<T>(k) * height;
    for (int64_t i = rows.begin; i < rows.end; i += height, panel += words * height) {
      pack(i, at_most(rows.end - i, height), k, at_most(K, k + kSlab), panel);
    }
  }
}

// B packed once, panel after panel, each over all of K: `each` elements. Those of B's type, paired
// where words are pairs (float stands for a word then), or int8, which are never paired.
template <class B>
struct PanelMatrix {
  const B* panels;
  int64_t each;
};

// Steps of K of the panels of a group of columns, from column `first` on.
template <class B>
struct PanelGroup {
  const B* data;
  int64_t first, each;
  const B* at(int64_t j) const { return data + (j - first) / NR * each; }
};

// Packed here and now, in `memory`,
template <class T, class PackB>
PanelGroup<float> panel_group(const PackB& pack_b, Slice columns, int64_t k, int64_t end,
                              float* memory) {
  const int64_t each = words_of<T>(end - k) * NR;
  for (int64_t slab = k; slab < end; slab += kSlab) {
    float* panel = memory + words_of<T>(slab - k) * NR;
    for (int64_t j = columns.begin; j < columns.end; j += NR, panel += each) {
      pack_b(j, at_most(columns.end - j, NR), slab, at_most(end, slab + kSlab), panel);
    }
  }
  return {memory, columns.begin, each};
}
// or long before.
template <class T, class B>
PanelGroup<B> panel_group(const PanelMatrix<B>& b, Slice columns, int64_t k, int64_t, float*) {
  const int64_t skipped = words_of<T>(k) * step_of<paired<T>, B>;
  return {b.panels + columns.begin / NR * b.each + skipped, columns.begin, b.each};
}

// The rows of one packed block of A times some columns of B, over all of K. B is a functor that
// packs it, or a PanelMatrix.
template <class T, class B, class Epilogue>
void multiply_block(const float* a, Slice rows, int64_t height, Slice columns, int64_t K,
                    int64_t row_block, const B& b, const Epilogue& epilogue,
                    const Scratch& scratch) {
  constexpr int64_t step = paired<T> ? 2 * KC : KC;
  const int64_t words = words_of<T>(K);
  for (int64_t first = columns.begin; first < columns.end; first += kGroup * NR) {
    const int64_t last = at_most(columns.end, first + kGroup * NR);
    int64_t k = 0;
    do {  // once even for no K: C is then 0
      const int64_t end = at_most(K, k + step), n = words_of<T>(end - k);
      const auto group = panel_group<T>(b, {first, last}, k, end, scratch.b);
      float* tile = scratch.c;
      for (int64_t i = rows.begin; i < rows.end; i += height) {
        const int64_t present = at_most(rows.end - i, height);
        const float* panel = a + (i - rows.begin) * words + words_of<T>(k) * height;
        for (int64_t j = first; j < last; j += NR, tile += kTile) {
          multiply_tile<paired<T>>(present, n, panel, height, group.at(j), tile, k == 0);
          if (end < K) continue;
          epilogue(Tile{i, j, int(present), int(at_most(last - j, NR)), tile, row_block,
                        i == rows.begin});
        }
      }
      k = end;
    } while (k < K);
  }
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

// C = A B. pack_a(i, rows, begin, end, out) and pack_b(j, columns, begin, end, out) write steps
// [begin, end) of a panel in the layout of T (pack.inl), begin even; epilogue(tile) takes each
// finished tile, from any thread.
template <class T, class PackA, class PackB, class Epilogue>
void gemm(const Plan& plan, const PackA& pack_a, const PackB& pack_b, const Epilogue& epilogue,
          float* workspace, const Parallel& parallel) {
  run_tasks(plan.tasks(), parallel, [&](int64_t task, int worker) BIGKERN_FN {
    const size_t each = Scratch::floats(plan.block_panels, plan.words);
    const Scratch scratch(plan.block_panels, workspace + size_t(worker) * each);
    const Slice rows = plan.rows(task);
    pack_block<T>(rows, plan.K, plan.height, scratch.a, pack_a);
    multiply_block<T>(scratch.a, rows, plan.height, plan.columns(task), plan.K,
                      task / plan.column_blocks, pack_b, epilogue, scratch);
  });
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
