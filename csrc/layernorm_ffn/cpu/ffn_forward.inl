// The FFN block's forward on the CPU: norm, two products, activation and residual in one pass over
// a block of rows.
//
//   x rows ----> packed as A, normalised on the way (pre-norm)
//                  | x packed W1: tiles of the pre-activation in L1
//                  v
//                epilogue: + b1, activation, packed again as the next A ----> preactivation, if
//                wanted
//                  | x packed W2: tiles of the output in L1
//                  v
//                epilogue: + b2 + x ----> y, or s and then its norm (post-norm), the rows still hot
//
// The F-wide activation of a block of rows never leaves the cache, and is never packed in a second
// pass: its tile is transposed while it lies in L1. When there are too few rows to give each thread
// a block, the two products run one after the other instead, each cut over its columns too.
//
// How the weights become panels, each time or once for all: ffn_weights.inl. Where they are int8,
// the epilogues multiply by the scale of the column first.
//
// Compiled once per instruction set.

#include "common/cpu/pages.h"

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "layernorm_ffn/cpu/ffn_weights.inl"
#endif

namespace bigkern::layernorm_ffn::BIGKERN_ISA {
namespace {

// x as A, normalised if stats are given.
template <class T>
struct PackX {
  const T* x;
  int64_t D;
  const RowStats* stats;  // [M], null: as it is
  const T *weight, *bias;
  int64_t height;  // of a panel

  vf operator()(int64_t i, int64_t k, int64_t n) const {
    const T* p = x + i * D + k;
    if (!stats) return load_upto(p, n);
    const vf w = load_or(weight, k, n, 1.0f), b = load_or(bias, k, n, 0.0f);
    return first_n(fma(normalised(p, n, stats[i]), w, b), n);
  }
  void operator()(int64_t i, int64_t rows, int64_t begin, int64_t end, float* out) const {
    const PackX& self = *this;
    const auto row = [&](int64_t r, int64_t k, int64_t n) BIGKERN_FN {
      if (!self.stats) return words_along(self.x + (i + r) * self.D + k, n);
      const auto values = [&](int64_t at, int64_t count)
                              BIGKERN_FN { return self(i + r, at, count); };
      return words_along<T>(k, n, values);
    };
    with_height(height, [&](auto constant) BIGKERN_FN {
      pack_rows<decltype(constant)::value, T>(rows, begin, end, out, row);
    });
  }
};

// First epilogue: the tile, scaled, plus b1, rounded to T, is the pre-activation; its activation
// goes to the A panels of the second product.
template <class T>
struct ActivationTile {
  int64_t F;
  Activation activation;
  const float* scale;  // of W1's rows, null: 1
  const T* b1;
  T* preactivation;      // [M, F] or [M, 2F], null: not wanted
  float* packed;         // panels from row0 on
  int64_t row0, height;  // of a panel
  Drop drop;

  // One row of the tile: c points at its NR sums, a takes its activations.
  template <Activation A>
  void row(const float* c, int64_t i, int64_t f, int64_t n, float* a) const {
    constexpr bool gated = is_gated(A);
    const int64_t width = gated ? 2 * F : F;
    T* pre = preactivation ? preactivation + i * width : nullptr;
    for (int64_t j = 0; j < n; j += W) {
      const vf p = biased(c + j, b1, pre, f + j, n - j);
      vf value = value_of<A>(p);
      if constexpr (gated) value *= biased(c + W, b1, pre, F + f, n);
      store(a + j, drop(value, i, f + j));
    }
  }
  vf biased(const float* c, const T* bias, T* pre, int64_t at, int64_t n) const {
    const vf p = load(c) * load_or(scale, at, n, 1.0f) + load_or(bias, at, n, 0.0f);
    if (pre) store_upto(pre + at, p, n);
    return round_to<T>(p);
  }

  __attribute__((noinline)) void operator()(const Tile& tile) const {
    const bool gated = is_gated(activation);
    const int64_t f = gated ? tile.j / 2 : tile.j;
    const int64_t n = at_most(F - f, gated ? W : NR);
    alignas(64) float a[MR * NR];
    with_activation(activation, [&](auto constant) BIGKERN_FN {
      for (int r = 0; r < tile.rows; ++r) {
        row<decltype(constant)::value>(tile.c + r * NR, tile.i + r, f, n, a + r * NR);
      }
    });
    const auto words = [&](int64_t r, int64_t k, int64_t count) BIGKERN_FN {
      const float* row = a + r * NR;
      const auto values = [&](int64_t at, int64_t m)
                              BIGKERN_FN { return first_n(load(row + at), m); };
      return words_along<T>(k, count, values);
    };
    float* panel = packed + (tile.i - row0) * words_of<T>(F) + words_of<T>(f) * height;
    with_height(height, [&](auto constant) BIGKERN_FN {
      pack_rows<decltype(constant)::value, T>(tile.rows, 0, n, panel, words);
    });
  }
};

// Second epilogue: out = drop(tile * scale + b2) + residual.
template <class T>
struct OutputTile {
  int64_t D;
  const float* scale;      // of W2's rows, null: 1
  const T *b2, *residual;  // null ok
  T* out;
  Drop drop;

  __attribute__((noinline)) void operator()(const Tile& tile) const {
    for (int r = 0; r < tile.rows; ++r) {
      const int64_t at = (tile.i + r) * D + tile.j;
      for (int64_t j = 0; j < tile.columns; j += W) {
        const int64_t n = tile.columns - j;
        const vf c = load(tile.c + r * NR + j) * load_or(scale, tile.j + j, n, 1.0f);
        const vf kept = drop(c + load_or(b2, tile.j + j, n, 0.0f), tile.i + r, tile.j + j);
        store_upto(out + at + j, kept + load_or(residual, at + j, n, 0.0f), n);
      }
    }
  }
};

// ---- layout and launch --------------------------------------------------------------------------

// A thread with this many panels of rows of its own runs both products on them. With fewer, packing
// the weights for them alone would cost too much: the products run one after the other then, cut
// over their columns too.
constexpr int64_t kFusedPanels = 10, kMaxFusedPanels = 37;  // its activation: 6 MB at F = 3072

template <class T>
struct FfnForward {
  const FfnParams& p;
  int threads;
  Plan up, down;  // the two products; in the fused form both have the blocks of rows of `up`
  bool fused;

  // Where things lie in the workspace, in floats: of each row, between the products, of each
  // thread.
  size_t stats_at, a2_at, scratch_at, scratch_each, total;

  FfnForward(const FfnParams& params, int thread_count) : p(params), threads(thread_count) {
    const int64_t N1 = product_columns(w1_rows(), gated());
    up = make_plan(p.M, N1, p.D, words_of<T>(p.D), threads, fitting_height(p.M));
    down = make_plan(p.M, p.D, p.F, words_of<T>(p.F), threads, up.height);
    const int64_t P = up.row_panels();
    fused = P >= kFusedPanels * threads;
    if (fused) {
      up.row_blocks = (P + kMaxFusedPanels * threads - 1) / (kMaxFusedPanels * threads) * threads;
      up.column_blocks = 1;
      up.block_panels = (P + up.row_blocks - 1) / up.row_blocks;
    }
    stats_at = 0;
    a2_at = round_up(size_t(p.M) * 3, kAlign);
    scratch_at = a2_at;
    scratch_each = Scratch::floats(up.block_panels, up.words);
    if (fused) {
      scratch_each += round_up(size_t(up.block_panels * MR * down.words), kAlign);
    } else {
      scratch_at += round_up(size_t(P * MR * down.words), kAlign);
      const size_t second = Scratch::floats(down.block_panels, 0);
      if (second > scratch_each) scratch_each = second;
    }
    total = scratch_at + size_t(threads) * scratch_each;
  }

  RowStats* stats() const { return reinterpret_cast<RowStats*>(floats()); }
  float* floats() const { return static_cast<float*>(p.workspace); }
  static const T* in(const void* q) { return static_cast<const T*>(q); }
  static T* out(void* q) { return static_cast<T*>(q); }

  bool gated() const { return is_gated(p.activation); }
  int64_t w1_rows() const { return gated() ? 2 * p.F : p.F; }
  Weight w1() const {
    const bool int8 = p.w1_scale != nullptr;
    return {p.w1, p.w1_panels, int8, w1_rows(), p.D, gated(), p.w1_transposed};
  }
  Weight w2() const {
    return {p.w2, p.w2_panels, p.w2_scale != nullptr, p.D, p.F, false, p.w2_transposed};
  }

  // Post-norm normalises what the second product left here, in place if nobody wants it.
  T* sum() const { return out(is_post(p.placement, p.norm) && p.s ? p.s : p.y); }

  void measure(const T* v, int64_t i) const {
    const RowStats row = row_stats(v + i * p.D, p.D, p.norm, p.eps);
    stats()[i] = row;
    if (p.mean) p.mean[i] = row.mean + row.shift;
    if (p.rstd) p.rstd[i] = row.rstd;
  }
  void before(Slice rows) const {
    if (!is_pre(p.placement, p.norm)) return;
    for (int64_t i = rows.begin; i < rows.end; ++i) measure(in(p.x), i);
  }
  void after(Slice rows) const {
    if (!is_post(p.placement, p.norm)) return;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      measure(sum(), i);
      normalise_row<T>(sum() + i * p.D, p.D, stats()[i], in(p.norm_weight), in(p.norm_bias),
                       out(p.y) + i * p.D);
    }
  }

  PackX<T> pack_x() const {
    const bool pre = is_pre(p.placement, p.norm);
    return {in(p.x), p.D, pre ? stats() : nullptr, in(p.norm_weight), in(p.norm_bias), up.height};
  }
  OutputTile<T> output_tile() const {
    const T* residual = p.residual ? in(p.x) : nullptr;
    return {p.D, p.w2_scale, in(p.b2), residual, sum(), Drop(p.dropout, kOutput)};
  }

  Drop hidden_drop() const { return Drop(p.hidden_dropout, kHidden); }

  Scratch scratch(int worker, const Plan& plan) const {
    return Scratch(plan.block_panels, floats() + scratch_at + size_t(worker) * scratch_each);
  }

  void first_product(int64_t task, const Scratch& scratch, float* a2, int64_t row0) const {
    const Slice rows = up.rows(task);
    pack_block<T>(rows, p.D, up.height, scratch.a, pack_x());
    const ActivationTile<T> activate = {
        p.F, p.activation, p.w1_scale, in(p.b1),     out(p.preactivation),
        a2,  row0,         up.height,  hidden_drop()};
    with_weight<T>(w1(), p.M, [&](const auto& b) BIGKERN_FN {
      multiply_block<T>(scratch.a, rows, up.height, up.columns(task), p.D, 0, b, activate, scratch);
    });
  }
  void second_product(const float* a2, Slice rows, Slice columns, const Scratch& scratch) const {
    with_weight<T>(w2(), p.M, [&](const auto& b) BIGKERN_FN {
      multiply_block<T>(a2, rows, up.height, columns, p.F, 0, b, output_tile(), scratch);
    });
  }

  void run_fused(const Parallel& parallel) const {
    run_tasks(up.row_blocks, parallel, [&](int64_t block, int worker) BIGKERN_FN {
      const Slice rows = up.rows(block);
      const Scratch own = scratch(worker, up);
      float* a2 = own.b + Scratch::floats(up.block_panels, up.words);
      before(rows);
      first_product(block, own, a2, rows.begin);
      second_product(a2, rows, {0, p.D}, own);
      after(rows);
    });
  }

  void run_in_turn(const Parallel& parallel) const {
    float* a2 = floats() + a2_at;
    const auto over_rows = [&](auto f)
                               BIGKERN_FN { parallel.for_range(0, p.M, row_grain(p.D), f); };
    over_rows([&](int64_t begin, int64_t end) BIGKERN_FN { before({begin, end}); });
    run_tasks(up.tasks(), parallel, [&](int64_t task, int worker) BIGKERN_FN {
      first_product(task, scratch(worker, up), a2, 0);
    });
    run_tasks(down.tasks(), parallel, [&](int64_t task, int worker) BIGKERN_FN {
      const Slice rows = down.rows(task);
      second_product(a2 + rows.begin * down.words, rows, down.columns(task), scratch(worker, down));
    });
    over_rows([&](int64_t begin, int64_t end) BIGKERN_FN { after({begin, end}); });
  }
};

template <class T>
void ffn_forward(const FfnParams& p, const Parallel& parallel) {
  const FfnForward<T> call(p, parallel.threads);
  prefer_large_pages(p.workspace, call.total * sizeof(float));
  const int64_t width = call.w1_rows();
  if (p.preactivation) prefer_large_pages(p.preactivation, size_t(p.M * width) * sizeof(T));
  call.fused ? call.run_fused(parallel) : call.run_in_turn(parallel);
}

}  // namespace
}  // namespace bigkern::layernorm_ffn::BIGKERN_ISA
