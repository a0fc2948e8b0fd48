// How the threads share a scan: who walks which sequences, and who makes which hidden units.
//
// A chain is a range of sequences of one direction: its steps depend on each other, on nothing
// else. A chain is walked by `columns` threads, each of which makes the same hidden units at every
// step, in blocks of NR, and finds their weights in its caches; after each step they wait for each
// other. More threads than that walk other chains.
//
//                    units 0..31   32..63    64..95
//                   +-----------+---------+---------+
//   sequences  0..5 |  thread 0 | thread 1           |  chain 0: a barrier a step
//                   +-----------+---------+---------+
//              6..9 |  thread 2 | thread 3           |  chain 1
//                   +-----------+---------+---------+
//
// Compiled once per instruction set.

#include "common/cpu/gemm.inl"
#include "common/cpu/team.h"
#include "recurrent/recurrent.h"

namespace bigkern::recurrent::BIGKERN_ISA {
using namespace bigkern::BIGKERN_ISA;
namespace {

// A product makes so many panels of columns at once, for so many row panels: their tiles and the
// weights stay in L2.
constexpr int64_t kPanels = 4, kRowPanels = 16;

constexpr int64_t at_least(int64_t x, int64_t limit) { return x < limit ? limit : x; }

struct Sharing {
  int64_t row_parts;  // chains of a direction
  int64_t columns;    // threads of a chain
};

// In cycles of a step: a tile takes 2 * rows * K of them, weights come 20 bytes a cycle from beyond
// L2, a barrier takes 400 and longer with more threads.
inline int64_t cost_of(const Sharing& s, const Sizes& of, int64_t threads) {
  const int64_t blocks = (of.H + NR - 1) / NR, rows = (of.B + s.row_parts - 1) / s.row_parts;
  const int64_t rounds = (of.D * s.row_parts * s.columns + threads - 1) / threads;
  const int64_t multiply = 2 * rows, stream = NR * 4 / 20;
  const int64_t products = (blocks + s.columns - 1) / s.columns * of.G() * of.H;
  const int64_t barrier = s.columns == 1 ? 0 : 300 + 100 * s.columns;
  return rounds * (products * (multiply > stream ? multiply : stream) + barrier);
}

inline Sharing share(const Sizes& of, int threads) {
  const int64_t blocks = (of.H + NR - 1) / NR;
  Sharing best{1, 1};
  for (int64_t columns = 1; columns <= at_most(threads, blocks); ++columns) {
    for (int64_t parts = 1; parts <= at_most(threads / columns, of.B); ++parts) {
      const Sharing other{parts, columns};
      if (cost_of(other, of, threads) < cost_of(best, of, threads)) best = other;
    }
  }
  return best;
}

// A workspace, handed out in parts that begin on cache lines.
class Workspace {
 public:
  explicit Workspace(void* workspace) : base_(static_cast<float*>(workspace)) {}
  float* take(int64_t floats) {
    float* part = base_ + used_;
    used_ += round_up(size_t(floats), kAlign / sizeof(float));
    return part;
  }
  size_t bytes() const { return used_ * sizeof(float); }

 private:
  float* base_;
  size_t used_ = 0;
};

// One step in the order of memory: rows offset .. offset + rows. None where rows is 0.
struct Step {
  int64_t t, offset, rows;
};

inline int64_t rows_at(const Sizes& of, int64_t t) {
  if (t < 0 || t >= of.T) return 0;
  return of.batch_sizes ? of.batch_sizes[t] : of.B;
}
// The first step of a walk up (0) or down (1), and the one after a step.
inline Step first_step(const Sizes& of, int64_t direction) {
  if (direction == 0) return {0, 0, rows_at(of, 0)};
  const int64_t rows = rows_at(of, of.T - 1);
  return {of.T - 1, of.N - rows, rows};
}
inline Step next_step(const Sizes& of, int64_t direction, const Step& s) {
  if (direction == 0) return {s.t + 1, s.offset + s.rows, rows_at(of, s.t + 1)};
  const int64_t rows = rows_at(of, s.t - 1);
  return {s.t - 1, s.offset - rows, rows};
}

// Sizes of what forward and backward keep in memory, for T's words.
template <class T>
struct Layout {
  int64_t G, H, blocks, words;  // blocks of NR units; words of H elements

  explicit Layout(const Sizes& of)
      : G(of.G()), H(of.H), blocks((of.H + NR - 1) / NR), words(words_of<T>(of.H)) {}
  int64_t units(int64_t block) const { return at_most(H - block * NR, NR); }
  int64_t width() const { return blocks * NR; }  // of a padded row of units
  // Packed weights of a direction, of so many words a column.
  int64_t panels(int64_t words) const { return blocks * G * words * NR; }
};

// One chain as one of its threads sees it. Its rows are cut into panels of about the same height: a
// last one of few rows would cost nearly as much as a full one.
struct Chain {
  int64_t index;                    // among all chains
  int64_t direction, begin, rows;   // its sequences
  int64_t height;                   // of its row panels
  int64_t first_panel;              // among those of all chains
  int64_t first_block, last_block;  // the thread's

  // How many of a step's rows are the chain's.
  int64_t present(int64_t step_rows) const {
    return step_rows <= begin ? 0 : at_most(step_rows - begin, rows);
  }
};

// Where a chain's walk finds things in tensors of type T.
template <class T>
struct Places {
  const Sizes& of;
  const Chain& chain;

  static const T* in(const void* x) { return static_cast<const T*>(x); }
  static T* out(void* x) { return static_cast<T*>(x); }

  // A block of a row of a step, in what has `per_unit` values for each h.
  int64_t at(const Step& step, int64_t row, int64_t block, int64_t per_unit) const {
    const int64_t n = step.offset + chain.begin + row;
    return (n * of.D + chain.direction) * per_unit * of.H + block * NR;
  }
  // A block of a sequence's state, in [D, B, H].
  int64_t of_state(int64_t block, int64_t row) const {
    return (chain.direction * of.B + chain.begin + row) * of.H + block * NR;
  }
};

// Row panels of a chain, and at most of all of them.
inline int64_t row_panels_each(const Sizes& of, int64_t row_parts) {
  return ((of.B + row_parts - 1) / row_parts + MR - 1) / MR;
}
inline int64_t even_height(int64_t rows) {
  const int64_t panels = (rows + MR - 1) / MR;
  return fitting_height((rows + panels - 1) / panels);
}
inline int64_t most_row_panels(const Sizes& of, int threads) {
  return of.D * (of.B / MR + 2 * at_most(threads, of.B) + 1);
}

// A thread of a team, and how the team shares the scan. barriers[0] is everybody's, then one for
// each group of threads that walks a chain.
struct Member {
  int me, team;
  Sharing sharing;
  Barrier* barriers;

  int64_t column() const { return me % sharing.columns; }
  void wait_for_all() const { barriers[0].wait(team); }
  void wait_for_chain() const { barriers[1 + me / sharing.columns].wait(int(sharing.columns)); }
};

// Calls walk(chain) for every chain of a thread.
template <class Walk>
void for_chains(const Sizes& of, int64_t blocks, const Member& member, const Walk& walk) {
  const Sharing& sharing = member.sharing;
  const int64_t parts = sharing.row_parts;
  const int64_t groups = member.team / sharing.columns, group = member.me / sharing.columns;
  if (group >= groups) return;
  const Slice own = slice_of(blocks, 1, member.column(), sharing.columns);
  for (int64_t index = group; index < of.D * parts; index += groups) {
    const Slice rows = slice_of(of.B, 1, index % parts, parts);
    const int64_t count = rows.end - rows.begin;
    walk(Chain{index, index / parts, rows.begin, count, even_height(count),
               index * row_panels_each(of, parts), own.begin, own.end});
  }
}

// Calls f(block, blocks) for a thread's blocks, `at_once` at a time, up at even steps and down at
// odd ones: a step begins with the weights that the one before it has left in L2.
template <class F>
void to_and_fro(const Chain& chain, int64_t at_once, int parity, const F& f) {
  const int64_t groups = (chain.last_block - chain.first_block + at_once - 1) / at_once;
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t block = chain.first_block + (parity == 0 ? i : groups - 1 - i) * at_once;
    f(block, at_most(chain.last_block - block, at_once));
  }
}

// Packs the weights [G, H, K] of all directions, block after block, gate after gate: each gate's NR
// rows over K or, transposed, its NR columns over H.
template <class T>
void pack_weights(const Layout<T>& layout, int64_t D, const void* const* weights, int64_t K,
                  bool transposed, float* panels, const Member& member) {
  const int64_t depth = transposed ? layout.H : K, each = words_of<T>(depth) * NR;
  const Slice own = slice_of(D * layout.blocks * layout.G, 1, member.me, member.team);
  for (int64_t i = own.begin; i < own.end; ++i) {
    const int64_t gate = i % layout.G, block = i / layout.G % layout.blocks;
    const T* w = static_cast<const T*>(weights[i / (layout.G * layout.blocks)]);
    const Matrix<T> rows = {w + gate * layout.H * K, K, 1};
    for (int64_t k = 0; k < depth; k += kSlab) {
      pack_panel<NR>(transposed ? rows.transposed() : rows, block * NR, layout.units(block), k,
                     at_most(depth, k + kSlab), panels + i * each + words_of<T>(k) * NR);
    }
  }
}

// fp32 rows, `stride` apart, into the words of a row panel.
template <class T>
void pack_state(const float* x, int64_t stride, int64_t rows, int64_t height, int64_t units,
                float* panel) {
  const auto row = [&](int64_t r, int64_t k, int64_t n) BIGKERN_FN {
    return words_along<T>(
        k, n, [&](int64_t at, int64_t) BIGKERN_FN { return load(x + r * stride + at); });
  };
  with_height(height, [&](auto constant) BIGKERN_FN {
    pack_rows<decltype(constant)::value, T>(at_most(rows, height), 0, units, panel, row);
  });
}

// tiles[panel][row panel] = A B over all words: A as row panels, B as `count` panels one after the
// other; a panel's tiles are `stride` tiles after the one's before. KC words at a time: A's part of
// a row panel stays in L1 for all panels, B's in L2 for all row panels. With one row panel there is
// nothing to come back to, and B is read in the order of memory.
template <class T>
void multiply_panels(int64_t rows, int64_t height, int64_t words, const float* a, const float* b,
                     int64_t count, float* tiles, int64_t stride) {
  const auto multiply = [&](int64_t k, int64_t i, int64_t j) BIGKERN_FN {
    multiply_tile<paired<T>>(at_most(rows - i, height), at_most(words - k, KC),
                             a + i * words + k * height, height, b + (j * words + k) * NR,
                             tiles + (j * stride + i / height) * kTile, k == 0);
  };
  if (rows <= height) {
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t k = 0; k < words; k += KC) multiply(k, 0, j);
    }
    return;
  }
  for (int64_t k = 0; k < words; k += KC) {
    for (int64_t i = 0; i < rows; i += height) {
      for (int64_t j = 0; j < count; ++j) multiply(k, i, j);
    }
  }
}

}  // namespace
}  // namespace bigkern::recurrent::BIGKERN_ISA
