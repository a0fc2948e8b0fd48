// The block on frozen weights: packed once, int8, or both, on every instruction set there is.
// Packed ones must give the bits of the block that packs for itself; int8 ones are held against
// plain loops in double on the weights that they stand for. Outputs, panels and workspaces start as
// NaN.

#include "layernorm_ffn_reference.h"

namespace bigkern::layernorm_ffn {
namespace {

constexpr int64_t kSlack = 64;  // bytes behind the panels that must stay as they are

std::vector<char> panels_of(WeightDtype dtype, int64_t rows, int64_t columns, bool gated,
                            const void* weight, const Parallel& parallel) {
  PackWeightParams p = {dtype, rows, columns, gated, weight, nullptr};
  const size_t element = dtype == WeightDtype::f32 ? 4 : dtype == WeightDtype::i8 ? 1 : 2;
  std::vector<char> panels(cpu::packed_elements(p) * element + kSlack, char(0xff));
  p.panels = panels.data();
  cpu::pack_weight(p, parallel);
  for (size_t i = panels.size() - kSlack; i < panels.size(); ++i) CHECK_EQ(panels[i], char(0xff));
  return panels;
}

// A weight with one scale a row; the tensor's values become those that it stands for.
struct Int8 {
  std::vector<int8_t> q;
  std::vector<float> scale;

  Int8(Tensor& weight, int64_t rows, std::mt19937& random) {
    std::uniform_int_distribution<int> draw(-128, 127);
    std::uniform_real_distribution<float> factor(0.5f, 1.5f);
    const int64_t columns = int64_t(weight.values.size()) / rows;
    for (int64_t i = 0; i < rows; ++i) {
      scale.push_back(factor(random) / 74 / std::sqrt(float(columns)));
      for (int64_t j = 0; j < columns; ++j) {
        q.push_back(int8_t(draw(random)));
        weight.values[size_t(i * columns + j)] = double(q.back()) * double(scale.back());
      }
    }
  }
};

FfnParams params_of(const FfnCase& c, const FfnData& d) {
  FfnParams p = {};
  p.dtype = c.dtype, p.M = c.M, p.D = c.D, p.F = c.F;
  p.norm = c.norm, p.activation = c.activation, p.placement = c.placement;
  p.residual = c.residual, p.eps = kEps;
  p.x = d.x.data(), p.norm_weight = d.nw.data(), p.norm_bias = d.nb.data();
  p.w1 = d.w1.data(), p.b1 = d.b1.data(), p.w2 = d.w2.data(), p.b2 = d.b2.data();
  p.dropout = p.hidden_dropout = kNoDropout;
  return p;
}

Tensor run(FfnParams p, const Parallel& parallel) {
  Tensor y = Tensor::poisoned(p.dtype, p.M * p.D);
  auto workspace = poisoned_workspace(cpu::ffn_forward_workspace(p, parallel.threads));
  p.y = y.data(), p.workspace = workspace.data();
  cpu::ffn_forward(p, parallel);
  CHECK_EQ(workspace.back(), kGuard);
  return y;
}

void check_packed(const FfnCase& c) {
  const FfnData d(c);
  const bool gated = is_gated(c.activation);
  everywhere([&](const Parallel& parallel) {
    const WeightDtype dtype = weight_dtype_of(c.dtype);
    const int64_t rows = gated ? 2 * c.F : c.F;
    const auto w1 = panels_of(dtype, rows, c.D, gated, d.w1.data(), parallel);
    const auto w2 = panels_of(dtype, c.D, c.F, false, d.w2.data(), parallel);
    FfnParams p = params_of(c, d);
    const Tensor want = run(p, parallel);
    p.w1_panels = w1.data(), p.w1 = nullptr;
    CHECK(run(p, parallel).bytes == want.bytes);
    p.w2_panels = w2.data(), p.w2 = nullptr;
    CHECK(run(p, parallel).bytes == want.bytes);
  });
}

void check_int8(const FfnCase& c) {
  FfnData d(c);
  const bool gated = is_gated(c.activation);
  const int64_t rows = gated ? 2 * c.F : c.F;
  std::mt19937 random(unsigned(c.M * 7 + c.D * 131 + c.F * 1031));
  const Int8 i1(d.w1, rows, random), i2(d.w2, c.D, random);
  d.forward(c, rows);
  everywhere([&](const Parallel& parallel) {
    const auto w1 = panels_of(WeightDtype::i8, rows, c.D, gated, i1.q.data(), parallel);
    const auto w2 = panels_of(WeightDtype::i8, c.D, c.F, false, i2.q.data(), parallel);
    FfnParams p = params_of(c, d);
    p.w1 = i1.q.data(), p.w1_scale = i1.scale.data();
    p.w2 = i2.q.data(), p.w2_scale = i2.scale.data();
    const Tensor y = run(p, parallel);
    check_close("y", y, d.y, tolerance(c.dtype) * (c.dtype == Dtype::f32 ? 2 : 1));
    p.w1_panels = w1.data(), p.w1 = nullptr, p.w2_panels = w2.data(), p.w2 = nullptr;
    CHECK(run(p, parallel).bytes == y.bytes);
  });
}

// Every height of a panel, one row more, and blocks of many panels.
constexpr int64_t kRows[] = {1, 2, 3, 5, 8, 9, 14, 15, 16, 17, 29, 63, 300};

void each_number_of_rows(void (*check)(const FfnCase&)) {
  for (const Dtype dtype : kDtypes) {
    for (const int64_t M : kRows) {
      check({dtype, M, 33, 63, Norm::layer, Activation::gelu, Placement::pre, true, true});
      check({dtype, M, 40, 31, Norm::rms, Activation::swiglu, Placement::post, false, false});
    }
  }
}

void each_activation(void (*check)(const FfnCase&)) {
  for (const Dtype dtype : kDtypes) {
    for (const Activation activation : kActivations) {
      check({dtype, 7, 31, 65, Norm::rms, activation, Placement::pre, true, false});
      check({dtype, 37, 64, 33, Norm::none, activation, Placement::post, true, true});
    }
  }
}

// Panels of one column, of one step of K, and sums that are cut.
void each_odd_shape(void (*check)(const FfnCase&)) {
  for (const Dtype dtype : kDtypes) {
    for (const int64_t D : {7, 129, 1023}) {
      for (const int64_t F : {1, 32, 129}) {
        check({dtype, 3, D, F, Norm::layer, Activation::silu, Placement::pre, true, true});
        check({dtype, 20, D, F, Norm::layer, Activation::geglu, Placement::pre, false, true});
      }
    }
  }
}

TEST(packed_for_each_number_of_rows) { each_number_of_rows(check_packed); }
TEST(packed_with_each_activation) { each_activation(check_packed); }
TEST(packed_of_odd_shapes) { each_odd_shape(check_packed); }
TEST(int8_for_each_number_of_rows) { each_number_of_rows(check_int8); }
TEST(int8_with_each_activation) { each_activation(check_int8); }
TEST(int8_of_odd_shapes) { each_odd_shape(check_int8); }

}  // namespace
}  // namespace bigkern::layernorm_ffn
