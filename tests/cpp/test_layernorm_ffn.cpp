// The CPU kernels of layernorm_ffn against plain loops in double, on every instruction set there
// is, serial and threaded. Outputs and workspaces start as NaN.

#include "layernorm_ffn_reference.h"

namespace bigkern::layernorm_ffn {
namespace {

// ---- norm ---------------------------------------------------------------------------------------

struct NormCase {
  Dtype dtype;
  int64_t M, N;
  Norm norm;
  bool residual, weight, bias;
  float mean = 0, deviation = 1;
  Dropout dropout = kNoDropout;
};

void check_norm(const NormCase& c) {
  std::mt19937 random(unsigned(c.M * 31 + c.N));
  const int64_t MN = c.M * c.N;
  const Tensor x = Tensor::normal(c.dtype, MN, c.mean, c.deviation, random);
  const Tensor residual =
      c.residual ? Tensor::normal(c.dtype, MN, 0, c.deviation, random) : absent(c.dtype, MN, 0);
  const Tensor weight =
      c.weight ? Tensor::normal(c.dtype, c.N, 1, 0.2f, random) : absent(c.dtype, c.N, 1);
  const Tensor bias = c.bias ? Tensor::normal(c.dtype, c.N, 0, 1, random) : absent(c.dtype, c.N, 0);
  const Tensor dy = Tensor::normal(c.dtype, MN, 0, 1, random);
  const Tensor dsum =
      c.residual ? Tensor::normal(c.dtype, MN, 0, 1, random) : absent(c.dtype, MN, 0);

  Tensor s = x;  // the sum, rounded
  if (c.residual) {
    for (size_t i = 0; i < size_t(MN); ++i) {
      const double factor = ref_factor(c.dropout, kOutput, int64_t(i) / c.N, int64_t(i) % c.N);
      s.store(i, float(float(x.values[i] * factor) + residual.values[i]));
    }
    for (size_t i = 0; i < size_t(MN); ++i) s.values[i] = s.load(i);
  }
  Doubles y(size_t(MN), 0), dx(size_t(MN), 0), dw(size_t(c.N), 0), db(size_t(c.N), 0);
  for (int64_t i = 0; i < c.M; ++i) {
    const double* row = s.values.data() + i * c.N;
    ref_norm(row, c.N, c.norm, weight.values.data(), bias.values.data(), y.data() + i * c.N);
    ref_norm_backward(dy.values.data() + i * c.N, row, c.N, c.norm, weight.values.data(),
                      dx.data() + i * c.N, dw.data(), db.data());
  }
  for (size_t i = 0; i < size_t(MN); ++i) dx[i] += dsum.values[i];

  everywhere([&](const Parallel& parallel) {
    Tensor got_y = Tensor::poisoned(c.dtype, MN);
    Tensor sum = c.residual ? Tensor::poisoned(c.dtype, MN) : Tensor();
    std::vector<float> mean(size_t(c.M), nan), rstd(size_t(c.M), nan);
    float* mean_out = c.norm == Norm::layer ? mean.data() : nullptr;
    cpu::norm_forward({c.dtype, c.M, c.N, c.norm, kEps, x.data(), residual.data(), weight.data(),
                       bias.data(), got_y.data(), sum.data(), mean_out, rstd.data(), c.dropout},
                      parallel);
    check_close("y", got_y, y, tolerance(c.dtype));
    if (c.residual) check_close("sum", sum, s.values, 0);

    Tensor got_dx = Tensor::poisoned(c.dtype, MN), got_dw = Tensor::poisoned(c.dtype, c.N),
           got_db = Tensor::poisoned(c.dtype, c.N);
    NormBackwardParams p = {c.dtype,   c.M,         c.N,           c.norm,
                            dy.data(), dsum.data(), s.data(),      weight.data(),
                            mean_out,  rstd.data(), got_dx.data(), nullptr,
                            nullptr,   nullptr,     nullptr,       kNoDropout};
    Tensor dropped = Tensor::poisoned(c.dtype, MN);
    p.dropout = c.dropout;
    if (c.dropout.active()) p.dx = dropped.data();
    if (c.weight) p.dweight = got_dw.data();
    if (c.bias) p.dbias = got_db.data();
    auto workspace = poisoned_workspace(cpu::norm_backward_workspace(p, parallel.threads));
    p.workspace = workspace.data();
    cpu::norm_backward(p, parallel);
    check_close("ds", got_dx, dx, tolerance(c.dtype));
    if (c.dropout.active()) {
      Doubles kept = dx;
      for (size_t i = 0; i < size_t(MN); ++i) {
        kept[i] *= ref_factor(c.dropout, kOutput, int64_t(i) / c.N, int64_t(i) % c.N);
      }
      check_close("dx", dropped, kept, tolerance(c.dtype));
    }
    if (c.weight) check_close("dweight", got_dw, dw, tolerance(c.dtype));
    if (c.bias) check_close("dbias", got_db, db, tolerance(c.dtype));
    CHECK_EQ(workspace.back(), kGuard);
  });
}

TEST(norm_of_odd_shapes) {
  for (const Dtype dtype : kDtypes) {
    for (const Norm norm : {Norm::layer, Norm::rms}) {
      for (const int64_t N : {1, 7, 63, 129, 1023}) {
        for (const int64_t M : {1, 7, 129}) check_norm({dtype, M, N, norm, true, true, true});
        check_norm({dtype, 63, N, norm, false, true, false});
        check_norm({dtype, 63, N, norm, false, false, false});
      }
    }
  }
}

TEST(norm_of_what_dropout_leaves) {
  for (const Dtype dtype : kDtypes) {
    for (const Norm norm : {Norm::layer, Norm::rms}) {
      for (const int64_t N : {7, 129}) {
        check_norm({dtype, 65, N, norm, true, true, true, 0, 1, dropout_of(0.3)});
      }
    }
  }
}

// The mean in fp32 is coarser than the deviation here: x = 1e4 +- 0.01 moves in steps of 1e-3.
TEST(norm_of_a_tiny_variance_on_a_large_mean) {
  for (const int64_t N : {64, 1023}) {
    check_norm({Dtype::f32, 65, N, Norm::layer, false, true, true, 1e4f, 0.01f});
    check_norm({Dtype::f32, 3, N, Norm::layer, false, true, true, -3e4f, 1.0f});
  }
}

TEST(norm_keeps_nan_in_its_row) {
  everywhere([&](const Parallel& parallel) {
    for (const Norm norm : {Norm::layer, Norm::rms}) {
      std::vector<float> x(3 * 20, 1.0f), y(3 * 20, -1.0f);
      x[25] = nan;
      cpu::norm_forward({Dtype::f32, 3, 20, norm, kEps, x.data(), nullptr, nullptr, nullptr,
                         y.data(), nullptr, nullptr, nullptr, kNoDropout},
                        parallel);
      for (size_t i = 0; i < 60; ++i) CHECK_EQ(std::isnan(y[i]), i / 20 == 1);
    }
  });
}

// ---- the whole block ----------------------------------------------------------------------------

// The weight gradients added to fp32 matrices, which are 1 before.
void check_sums(FfnBackwardParams p, Doubles dw1, Doubles dw2, double tol,
                const Parallel& parallel) {
  std::vector<float> w1_sum(dw1.size(), 1.0f), w2_sum(dw2.size(), 1.0f);
  p.dw1 = p.dw2 = nullptr, p.w1_sum = w1_sum.data(), p.w2_sum = w2_sum.data();
  auto workspace = poisoned_workspace(cpu::ffn_backward_workspace(p, parallel.threads));
  p.workspace = workspace.data();
  cpu::ffn_backward(p, parallel);
  CHECK_EQ(workspace.back(), kGuard);
  const auto check = [&](const char* what, const std::vector<float>& sum, Doubles& want) {
    Tensor got = Tensor::poisoned(Dtype::f32, int64_t(sum.size()));
    for (size_t i = 0; i < sum.size(); ++i) got.store(i, sum[i]), want[i] += 1;
    check_close(what, got, want, tol);
  };
  check("w1_sum", w1_sum, dw1);
  check("w2_sum", w2_sum, dw2);
}

void check_ffn(const FfnCase& c) {
  FfnData d(c);
  const int64_t width = is_gated(c.activation) ? 2 * c.F : c.F;
  const bool post = c.placement == Placement::post;
  // Over one column the norm leaves its bias alone, and dw1 is the rest of a sum that cancels.
  const double tol = tolerance(c.dtype) * (c.D == 1 ? 4 : c.dtype == Dtype::f32 ? 2 : 1);
  everywhere([&](const Parallel& parallel) {
    Tensor y = Tensor::poisoned(c.dtype, c.M * c.D), s, h;
    if (c.training && post) s = Tensor::poisoned(c.dtype, c.M * c.D);
    if (c.training) h = Tensor::poisoned(c.dtype, c.M * width);
    std::vector<float> mean(size_t(c.M), nan), rstd(size_t(c.M), nan);
    float* mean_out = c.training && c.norm == Norm::layer ? mean.data() : nullptr;
    FfnParams p = {
        c.dtype,     c.M,         c.D,         c.F,         c.norm,      c.activation,
        c.placement, c.residual,  kEps,        d.x.data(),  d.nw.data(), d.nb.data(),
        d.w1.data(), d.b1.data(), d.w2.data(), d.b2.data(), y.data(),    mean_out,
        nullptr,     h.data(),    s.data(),    nullptr,     c.dropout,   c.hidden_dropout};
    if (c.training) p.rstd = rstd.data();
    auto workspace = poisoned_workspace(cpu::ffn_forward_workspace(p, parallel.threads));
    p.workspace = workspace.data();
    cpu::ffn_forward(p, parallel);
    CHECK_EQ(workspace.back(), kGuard);
    check_close("y", y, d.y, tol);
    if (!c.training) return;
    check_close("preactivation", h, d.h, tol);
    if (post) check_close("s", s, d.s, tol);
    if (c.activation == Activation::relu) {
      // Its slope jumps at 0, where rounding decides: ask for the gradient at the saved side.
      for (size_t i = 0; i < d.h.size(); ++i) d.h[i] = h.load(i);
      d.backward(c, width);
    }

    Tensor dx = Tensor::poisoned(c.dtype, c.M * c.D), dw1 = Tensor::poisoned(c.dtype, width * c.D);
    Tensor dw2 = Tensor::poisoned(c.dtype, c.D * c.F), db1 = Tensor::poisoned(c.dtype, width);
    Tensor db2 = Tensor::poisoned(c.dtype, c.D), dnw = db2, dnb = db2;
    // Everything at once, then one gradient at a time.
    struct Wanted {
      const char* name;
      void* FfnBackwardParams::* at;
      Tensor* got;
      const Doubles* want;
    };
    const Wanted all[] = {
        {"dx", &FfnBackwardParams::dx, &dx, &d.dx},
        {"dnorm_weight", &FfnBackwardParams::dnorm_weight, &dnw, &d.dnw},
        {"dnorm_bias", &FfnBackwardParams::dnorm_bias, &dnb, &d.dnb},
        {"dw1", &FfnBackwardParams::dw1, &dw1, &d.dw1},
        {"db1", &FfnBackwardParams::db1, &db1, &d.db1},
        {"dw2", &FfnBackwardParams::dw2, &dw2, &d.dw2},
        {"db2", &FfnBackwardParams::db2, &db2, &d.db2},
    };
    FfnBackwardParams b = {};
    b.dtype = c.dtype, b.M = c.M, b.D = c.D, b.F = c.F;
    b.norm = c.norm, b.activation = c.activation, b.placement = c.placement;
    b.residual = c.residual;
    b.dy = d.dy.data(), b.x = d.x.data(), b.norm_weight = d.nw.data(), b.norm_bias = d.nb.data();
    b.w1 = d.w1.data(), b.w2 = d.w2.data(), b.mean = mean_out, b.rstd = rstd.data();
    b.preactivation = h.data(), b.s = s.data();
    b.dropout = c.dropout, b.hidden_dropout = c.hidden_dropout;
    const auto run_and_check = [&](FfnBackwardParams q) {
      auto workspace = poisoned_workspace(cpu::ffn_backward_workspace(q, parallel.threads));
      q.workspace = workspace.data();
      cpu::ffn_backward(q, parallel);
      CHECK_EQ(workspace.back(), kGuard);
      for (const Wanted& w : all) {
        if (q.*w.at) check_close(w.name, *w.got, *w.want, tol);
      }
    };
    FfnBackwardParams everything = b;
    for (const Wanted& w : all) everything.*w.at = w.got->data();
    run_and_check(everything);
    check_sums(everything, d.dw1, d.dw2, tol, parallel);
    for (const Wanted& w : all) {
      if (c.M > 64) break;
      *w.got = Tensor::poisoned(c.dtype, int64_t(w.want->size()));
      FfnBackwardParams one = b;
      one.*w.at = w.got->data();
      run_and_check(one);
    }
  });
}

void check_variants(int64_t M, int64_t D, int64_t F) {
  for (const Dtype dtype : kDtypes) {
    for (const Activation activation : kActivations) {
      for (const Placement placement : {Placement::pre, Placement::post}) {
        check_ffn({dtype, M, D, F, Norm::layer, activation, placement, true, true});
        check_ffn({dtype, M, D, F, Norm::rms, activation, placement, false, false});
      }
    }
  }
}

TEST(ffn_variants_on_few_rows) { check_variants(7, 33, 63); }
TEST(ffn_variants_on_many_rows) { check_variants(129, 40, 31); }

TEST(ffn_of_odd_shapes) {
  for (const Dtype dtype : kDtypes) {
    for (const int64_t size : {1, 7, 63, 129}) {
      check_ffn({dtype, 63, size, 129, Norm::layer, Activation::gelu, Placement::pre, true, true});
      check_ffn({dtype, 129, 7, size, Norm::rms, Activation::swiglu, Placement::pre, true, false});
      check_ffn({dtype, 1, size, 7, Norm::layer, Activation::silu, Placement::post, true, true});
      check_ffn({dtype, size, 63, 7, Norm::layer, Activation::relu, Placement::post, true, true});
    }
    check_ffn({dtype, 7, 1023, 9, Norm::layer, Activation::gelu, Placement::pre, true, true});
    check_ffn({dtype, 1023, 5, 9, Norm::layer, Activation::geglu, Placement::pre, true, true});
  }
}

TEST(ffn_with_dropout) {
  const Dropout output = dropout_of(0.2), hidden = dropout_of(0.4);
  for (const Dtype dtype : kDtypes) {
    for (const Placement placement : {Placement::pre, Placement::post}) {
      for (const Activation activation : {Activation::gelu, Activation::swiglu}) {
        for (const bool both : {true, false}) {
          check_ffn({dtype, 37, 33, 40, Norm::layer, activation, placement, true, true, true,
                     both ? output : kNoDropout, hidden});
          check_ffn({dtype, 129, 20, 31, Norm::rms, activation, placement, both, true, true, output,
                     both ? hidden : kNoDropout});
        }
      }
    }
  }
}

// More tokens than one part of a weight gradient takes.
TEST(ffn_of_many_tokens) {
  for (const Dtype dtype : kDtypes) {
    check_ffn({dtype, 4099, 5, 7, Norm::layer, Activation::gelu, Placement::pre, true, true});
  }
}

TEST(ffn_without_training_outputs) {
  for (const Placement placement : {Placement::pre, Placement::post}) {
    for (const int64_t M : {3, 130}) {
      check_ffn(
          {Dtype::f32, M, 33, 40, Norm::layer, Activation::swiglu, placement, true, true, false});
    }
  }
}

// The same bits whatever the number of threads and whichever thread took which block.
TEST(ffn_is_reproducible) {
  const FfnCase c = {Dtype::f32,     300,  48,  100, Norm::layer, Activation::gelu,
                     Placement::pre, true, true};
  const FfnData d(c);
  std::vector<char> first;
  for (int round = 0; round < 6; ++round) {
    Tensor y = Tensor::poisoned(c.dtype, c.M * c.D);
    FfnParams p = {c.dtype,     c.M,         c.D,         c.F,         c.norm,      c.activation,
                   c.placement, c.residual,  kEps,        d.x.data(),  d.nw.data(), d.nb.data(),
                   d.w1.data(), d.b1.data(), d.w2.data(), d.b2.data(), y.data(),    nullptr,
                   nullptr,     nullptr,     nullptr,     nullptr,     kNoDropout,  kNoDropout};
    const Parallel parallel = round % 2 ? std_threads<4>() : Parallel::serial();
    auto workspace = poisoned_workspace(cpu::ffn_forward_workspace(p, parallel.threads));
    p.workspace = workspace.data();
    cpu::ffn_forward(p, parallel);
    if (round == 0) first = y.bytes;
    CHECK(first == y.bytes);
  }
}

TEST(nothing_to_do) {
  everywhere([&](const Parallel& parallel) {
    float none = 0;
    cpu::norm_forward({Dtype::f32, 0, 8, Norm::layer, kEps, &none, nullptr, nullptr, nullptr, &none,
                       nullptr, nullptr, nullptr, kNoDropout},
                      parallel);
    std::vector<float> w(64, 1.0f), workspace(1 << 18, nan);
    FfnParams p = {};
    p.dtype = Dtype::f32, p.D = 8, p.F = 8, p.eps = kEps;
    p.x = &none, p.w1 = w.data(), p.w2 = w.data(), p.y = &none, p.workspace = workspace.data();
    CHECK(cpu::ffn_forward_workspace(p, parallel.threads) <= workspace.size() * sizeof(float));
    cpu::ffn_forward(p, parallel);
    // Gradients over no tokens are zero, not unset.
    std::vector<float> dw1(64, nan), dw2(64, nan), db1(8, nan), db2(8, nan), dnw(8, nan);
    FfnBackwardParams b = {};
    b.dtype = Dtype::f32, b.D = 8, b.F = 8;
    b.dy = &none, b.x = &none, b.w1 = w.data(), b.w2 = w.data(), b.preactivation = &none;
    b.dw1 = dw1.data(), b.dw2 = dw2.data(), b.db1 = db1.data(), b.db2 = db2.data();
    b.dnorm_weight = dnw.data();
    CHECK(cpu::ffn_backward_workspace(b, parallel.threads) <= workspace.size() * sizeof(float));
    b.workspace = workspace.data();
    cpu::ffn_backward(b, parallel);
    for (const auto* gradient : {&dw1, &dw2, &db1, &db2, &dnw}) {
      for (const float g : *gradient) CHECK_EQ(g, 0.0f);
    }
  });
}

}  // namespace
}  // namespace bigkern::layernorm_ffn
