// The FFN block's backward on the CPU: four products around the saved pre-activation h.
//
//   ds = dy, or the norm's backward of dy (post-norm);  dz = drop(ds)                     [M, D]
//   da = drop(dz W2)    epilogue: a = drop(act(h)), dh = da act'(h), db1 += dh           [M, F]
//   dW2 = dz^T a        db2 = sum of dz's rows
//   dW1 = dh^T n        n = norm(x), rebuilt while it is packed (pre-norm), or x
//   dn = dh W1          pre-norm: then the norm's backward;  both: + ds                  [M, D]
//
// da, and n, are never stored. Weight gradients sum over the tokens kTokens at a time, in fp32, so
// that packed panels stay in the cache however many tokens there are.
//
// Compiled once per instruction set.

#include <initializer_list>

#include "common/cpu/pages.h"

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "layernorm_ffn/cpu/ffn_forward.inl"
#endif

namespace bigkern::layernorm_ffn::BIGKERN_ISA {
namespace {

constexpr int64_t kTokens = 2048;

// Epilogue of da = dz W2.
template <class T>
struct ActivationBackwardTile {
  ActivationBackward<T> at;
  Activation activation;
  float* db1;  // [row blocks, F or 2F] partial sums, null: not wanted

  template <Activation A>
  void column(const Tile& tile, int64_t j, int64_t n) const {
    constexpr bool gated = is_gated(A);
    const int64_t width = gated ? 2 * at.F : at.F, f = tile.j + j;
    HiddenGradient sum = {zero(), zero()};
    for (int r = 0; r < tile.rows; ++r) {
      const HiddenGradient d = at.template run<A>(load(tile.c + r * NR + j), tile.i + r, f, n);
      sum.gate += d.gate;
      sum.up += d.up;
    }
    if (!db1) return;
    float* sums = db1 + tile.row_block * width;
    accumulate(sums, f, sum.gate, n, tile.first);
    if constexpr (gated) accumulate(sums, at.F + f, sum.up, n, tile.first);
  }

  void operator()(const Tile& tile) const {
    with_activation(activation, [&](auto constant) BIGKERN_FN {
      for (int64_t j = 0; j < tile.columns; j += W) {
        column<decltype(constant)::value>(tile, j, tile.columns - j);
      }
    });
  }
};

template <class T>
struct FfnBackward {
  const FfnBackwardParams& p;
  int threads;
  bool pre, post, want_dh, want_dn, want_dnorm, want_dw1, want_dw2;
  Drop drop, hidden_drop;
  int64_t width;   // of h: F or 2F
  int64_t tokens;  // of one part of a weight gradient
  bool widen;      // parts are added up in fp32 first: T itself is too coarse
  Plan da, dw2, dw1, dn;

  // Where things lie in the workspace, in floats.
  size_t ds_at, dz_at, n_at, dn_at, a_at, dh_at, db1_at, sums_at, weight_at, gemm_at, total;

  FfnBackward(const FfnBackwardParams& params, int thread_count)
      : p(params),
        threads(thread_count),
        drop(p.dropout, kOutput),
        hidden_drop(p.hidden_dropout, kHidden) {
    pre = is_pre(p.placement, p.norm), post = is_post(p.placement, p.norm);
    want_dw1 = p.dw1 || p.w1_sum;
    want_dw2 = p.dw2 || p.w2_sum;
    want_dnorm = p.dnorm_weight || p.dnorm_bias;
    want_dn = p.dx || (pre && want_dnorm);
    want_dh = want_dn || want_dw1 || p.db1;
    width = is_gated(p.activation) ? 2 * p.F : p.F;
    const int64_t parts = (p.M + kTokens - 1) / kTokens;
    tokens = parts > 1 ? ((p.M + parts - 1) / parts + 1) / 2 * 2 : p.M;  // even: bf16 pairs
    da = make_plan(p.M, p.F, p.D, words_of<T>(p.D), threads);
    const auto gradient_plan = [&](int64_t rows, int64_t columns, bool transposed) BIGKERN_FN {
      const int64_t M = transposed ? columns : rows, N = transposed ? rows : columns;
      return make_plan(M, N, tokens, words_of<T>(tokens), threads);
    };
    dw2 = gradient_plan(p.D, p.F, p.w2_transposed);
    dw1 = gradient_plan(width, p.D, p.w1_transposed);
    dn = make_plan(p.M, p.D, width, words_of<T>(width), threads);
    lay_out();
  }

  void lay_out() {
    size_t at = 0;
    const auto take = [&](bool wanted, int64_t count, size_t size) {
      const size_t here = at;
      if (wanted) at += round_up((size_t(count) * size + 3) / 4, kAlign);
      return here;
    };
    ds_at = take(post, p.M * p.D, sizeof(T));
    dz_at = take(drop.active(), p.M * p.D, sizeof(T));
    dn_at = take(pre && want_dn, p.M * p.D, sizeof(float));
    n_at = take(pre && want_dw1, p.M * p.D, sizeof(T));
    a_at = take(want_dw2, p.M * p.F, sizeof(T));
    dh_at = take(want_dh, p.M * width, sizeof(T));
    db1_at = take(p.db1, da.row_blocks * width, sizeof(float));
    sums_at = take(true, row_sum_blocks(p.M) * 2 * p.D, sizeof(float));
    widen = sizeof(T) < sizeof(float) && tokens < p.M && (p.dw1 || p.dw2);
    weight_at = take(widen, width * p.D, sizeof(float));
    gemm_at = at;
    size_t most = 0;
    for (const Plan* plan : {&da, &dw2, &dw1, &dn}) {
      const size_t floats = gemm_workspace(*plan, threads);
      if (floats > most) most = floats;
    }
    total = gemm_at + most;
  }

  float* floats(size_t at) const { return static_cast<float*>(p.workspace) + at; }
  T* stored(size_t at) const { return reinterpret_cast<T*>(floats(at)); }
  static const T* in(const void* q) { return static_cast<const T*>(q); }
  static T* out(void* q) { return static_cast<T*>(q); }
  const T* n() const { return pre ? stored(n_at) : in(p.x); }
  const T* ds() const { return post ? stored(ds_at) : in(p.dy); }
  const T* dz() const { return drop.active() ? stored(dz_at) : ds(); }

  // The norm's backward: post-norm from dy to ds, pre-norm from dn to dx; `dropped` as drop(dv).
  template <class G>
  void norm_backward(const G* gradient, const T* added, const T* v, T* dv, T* dropped,
                     const Parallel& parallel) const {
    const auto make_row = [&](int64_t i) BIGKERN_FN {
      const int64_t at = i * p.D;
      return NormBackwardRow<T, G>{
          gradient + at,          added ? added + at : nullptr,    v + at,
          in(p.norm_weight),      p.mean ? p.mean[i] : 0.0f,       p.rstd[i],
          dv ? dv + at : nullptr, dropped ? dropped + at : nullptr};
    };
    norm_backward_rows(p.M, p.D, p.norm, drop, out(p.dnorm_weight), out(p.dnorm_bias),
                       floats(sums_at), make_row, parallel);
  }

  // a = drop(act(h)), where nothing but dW2 is wanted.
  void rebuild_activation(T* a, const Parallel& parallel) const {
    BiasActivationParams pass = {};
    pass.M = p.M, pass.F = p.F, pass.activation = p.activation, pass.dropout = p.hidden_dropout;
    pass.product = p.preactivation, pass.out = a;
    bias_activation<T>(pass, parallel);
  }

  void through_activation(const Parallel& parallel) const {
    T* a = want_dw2 ? stored(a_at) : nullptr;
    if (!want_dh) {
      if (a) rebuild_activation(a, parallel);
      return;
    }
    float* db1 = p.db1 ? floats(db1_at) : nullptr;
    const ActivationBackward<T> at = {p.F, in(p.preactivation), stored(dh_at), a, hidden_drop};
    const ActivationBackwardTile<T> tile = {at, p.activation, db1};
    const Matrix<T> A = {dz(), p.D, 1}, B = weight(p.w2, p.D, p.F, p.w2_transposed);
    gemm<T>(da, A, B, tile, floats(gemm_at), parallel);
    add_partial_sums(db1, p.M > 0 ? da.row_blocks : 0, width, width, out(p.db1), parallel);
  }

  // A weight [rows, columns] as it lies.
  static Matrix<T> weight(const void* w, int64_t rows, int64_t columns, bool transposed) {
    return transposed ? Matrix<T>{in(w), 1, rows} : Matrix<T>{in(w), columns, 1};
  }

  // dw = sum over tokens of dy^T x, in parts, or added to `sum`; transposed, of x^T dy. dy and x
  // are [M, ..], tokens by what a layer writes and reads.
  void weight_gradient(Plan plan, T* dw, float* sum, const Matrix<T>& dy, const Matrix<T>& x,
                       bool transposed, const Parallel& parallel) const {
    if (!dw && !sum) return;
    const Matrix<T> left = transposed ? x : dy, right = transposed ? dy : x;
    float* wide = sum ? sum : widen ? floats(weight_at) : nullptr;
    int64_t k0 = 0;
    do {  // once even for no tokens: the gradient is then 0
      plan.K = at_most(tokens, p.M - k0);
      plan.words = words_of<T>(plan.K);
      const Matrix<T> a = {left.data + k0 * left.row, 1, left.row};
      const Matrix<T> b = {right.data + k0 * right.row, right.row, 1};
      if (wide) {
        const StoreTile<float> tile = {wide, plan.N, sum || k0 > 0};
        gemm<T>(plan, a, b, tile, floats(gemm_at), parallel);
      } else {
        const StoreTile<T> tile = {dw, plan.N, k0 > 0};
        gemm<T>(plan, a, b, tile, floats(gemm_at), parallel);
      }
      k0 += tokens;
    } while (k0 < p.M);
    if (dw && wide) add_partial_sums(wide, 1, 0, plan.M * plan.N, dw, parallel);
  }

  void find_dz(const Parallel& parallel) const {
    T* dropped = drop.active() ? stored(dz_at) : nullptr;
    if (post) {
      const T* nothing = nullptr;
      norm_backward(in(p.dy), nothing, in(p.s), stored(ds_at), dropped, parallel);
    } else if (dropped) {
      parallel.for_range(0, p.M, 1, [&](int64_t begin, int64_t end) BIGKERN_FN {
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t j = 0; j < p.D; j += W) {
            const vf dz = drop(load_upto(ds() + i * p.D + j, p.D - j), i, j);
            store_upto(dropped + i * p.D + j, dz, p.D - j);
          }
        }
      });
    }
  }

  void run(const Parallel& parallel) const {
    find_dz(parallel);
    sum_rows(dz(), p.M, p.D, out(p.db2), floats(sums_at), parallel);
    through_activation(parallel);
    weight_gradient(dw2, out(p.dw2), p.w2_sum, {dz(), p.D, 1}, {stored(a_at), p.F, 1},
                    p.w2_transposed, parallel);
    if (pre && want_dw1) find_n(parallel);
    weight_gradient(dw1, out(p.dw1), p.w1_sum, {stored(dh_at), width, 1}, {n(), p.D, 1},
                    p.w1_transposed, parallel);
    if (want_dn) through_w1(parallel);
  }

  void through_w1(const Parallel& parallel) const {
    const Matrix<T> A = {stored(dh_at), width, 1}, B = weight(p.w1, width, p.D, p.w1_transposed);
    if (!pre) {
      const OutputTile<T> tile = {p.D,       nullptr,          nullptr, p.residual ? ds() : nullptr,
                                  out(p.dx), Drop({}, kOutput)};
      gemm<T>(dn, A, B, tile, floats(gemm_at), parallel);
      return;
    }
    gemm<T>(dn, A, B, StoreTile<float>{floats(dn_at), p.D, false}, floats(gemm_at), parallel);
    const T* through = p.residual ? in(p.dy) : nullptr;
    norm_backward(floats(dn_at), through, in(p.x), out(p.dx), static_cast<T*>(nullptr), parallel);
  }

  // n = norm(x) again: mean and rstd were saved, shift is found anew (norm.inl).
  void find_n(const Parallel& parallel) const {
    parallel.for_range(0, p.M, 1, [&](int64_t begin, int64_t end) BIGKERN_FN {
      for (int64_t i = begin; i < end; ++i) {
        const T* x = in(p.x) + i * p.D;
        RowStats row = {p.mean ? p.mean[i] : 0.0f, 0.0f, p.rstd[i]};
        if (p.norm == Norm::layer) {
          vf sum = zero();
          for (int64_t j = 0; j < p.D; j += W) {
            sum += first_n(load_upto(x + j, p.D - j) - row.mean, p.D - j);
          }
          row.shift = reduce_add(sum) / float(p.D);
        }
        normalise_row(x, p.D, row, in(p.norm_weight), in(p.norm_bias), stored(n_at) + i * p.D);
      }
    });
  }
};

template <class T>
void ffn_backward(const FfnBackwardParams& p, const Parallel& parallel) {
  const FfnBackward<T> call(p, parallel.threads);
  prefer_large_pages(p.workspace, call.total * sizeof(float));
  call.run(parallel);
}

}  // namespace
}  // namespace bigkern::layernorm_ffn::BIGKERN_ISA
