// The CPU kernels of layernorm_ffn against plain loops in double, on every instruction set there
// is, serial and threaded. Outputs and workspaces start as NaN.

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "check.h"
#include "common/cpu/isa.h"
#include "layernorm_ffn/layernorm_ffn.h"
#include "threads.h"

namespace bigkern::layernorm_ffn {
namespace {

using Doubles = std::vector<double>;

const float nan = std::numeric_limits<float>::quiet_NaN();
constexpr float kEps = 1e-5f;
constexpr Dropout kNoDropout = {0, 0, 0, 1.0f};

// ---- the specification, in double ---------------------------------------------------------------

struct RefStats {
  double mean, rstd;
};

RefStats ref_stats(const double* v, int64_t N, Norm norm) {
  double mean = 0, variance = 0;
  for (int64_t j = 0; j < N; ++j) mean += norm == Norm::layer ? v[j] / double(N) : 0;
  for (int64_t j = 0; j < N; ++j) variance += (v[j] - mean) * (v[j] - mean) / double(N);
  return {mean, 1 / std::sqrt(variance + double(kEps))};
}

// y = norm(v), and its gradients: dv, dw += , db += .
void ref_norm(const double* v, int64_t N, Norm norm, const double* w, const double* b, double* y) {
  const RefStats stats = ref_stats(v, N, norm);
  for (int64_t j = 0; j < N; ++j) y[j] = (v[j] - stats.mean) * stats.rstd * w[j] + b[j];
}

void ref_norm_backward(const double* dy, const double* v, int64_t N, Norm norm, const double* w,
                       double* dv, double* dw, double* db) {
  const RefStats stats = ref_stats(v, N, norm);
  double g_sum = 0, gx_sum = 0;
  for (int64_t j = 0; j < N; ++j) {
    const double x_hat = (v[j] - stats.mean) * stats.rstd;
    dw[j] += dy[j] * x_hat;
    db[j] += dy[j];
    g_sum += norm == Norm::layer ? dy[j] * w[j] / double(N) : 0;
    gx_sum += dy[j] * w[j] * x_hat / double(N);
  }
  for (int64_t j = 0; j < N; ++j) {
    const double x_hat = (v[j] - stats.mean) * stats.rstd;
    dv[j] = stats.rstd * (dy[j] * w[j] - g_sum - x_hat * gx_sum);
  }
}

double ref_value(Activation activation, double x) {
  switch (activation) {
    case Activation::relu:
      return x > 0 ? x : 0;
    case Activation::gelu:
    case Activation::geglu:
      return x * 0.5 * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::gelu_tanh:
      return x * 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    default:
      return x / (1 + std::exp(-x));
  }
}

double ref_slope(Activation activation, double x) {
  if (activation == Activation::relu) return x > 0 ? 1 : 0;
  const double h = 1e-5;
  return (ref_value(activation, x + h) - ref_value(activation, x - h)) / (2 * h);
}

// C [M, N] = A [M, K] B [K, N], each read through its strides.
Doubles ref_product(int64_t M, int64_t N, int64_t K, const Doubles& A, int64_t a_row,
                    int64_t a_column, const Doubles& B, int64_t b_row, int64_t b_column) {
  Doubles C(size_t(M * N), 0);
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t k = 0; k < K; ++k) {
      const double a = A[size_t(i * a_row + k * a_column)];
      for (int64_t j = 0; j < N; ++j) {
        C[size_t(i * N + j)] += a * B[size_t(k * b_row + j * b_column)];
      }
    }
  }
  return C;
}

// What dropout makes of 1 at (i, j): 0 or 1 / (1 - p). (common/dropout.h is tested by itself.)
double ref_factor(const Dropout& dropout, uint32_t head, int64_t i, int64_t j) {
  const uint32_t bits = dropout.head(head).row(uint32_t(i)).bits(uint32_t(j));
  return bits >= dropout.threshold ? double(dropout.scale) : 0.0;
}

Dropout dropout_of(double p) {
  return {123456789u, 987654321u, uint32_t(p * 4294967296.0), float(1 / (1 - p))};
}

// ---- storage ------------------------------------------------------------------------------------

// Values of one dtype, as bytes and as the doubles that they mean.
struct Tensor {
  Dtype dtype = Dtype::f32;
  Doubles values;
  std::vector<char> bytes;

  static size_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

  void store(size_t i, float v) {
    const bf16 b = from_float<bf16>(v);
    const fp16 h = from_float<fp16>(v);
    if (dtype == Dtype::f32) memcpy(&bytes[i * 4], &v, 4);
    if (dtype == Dtype::bf16) memcpy(&bytes[i * 2], &b, 2);
    if (dtype == Dtype::f16) memcpy(&bytes[i * 2], &h, 2);
  }
  double load(size_t i) const {
    float v;
    bf16 b;
    fp16 h;
    if (dtype == Dtype::f32) return memcpy(&v, &bytes[i * 4], 4), v;
    if (dtype == Dtype::bf16) return memcpy(&b, &bytes[i * 2], 2), to_float(b);
    return memcpy(&h, &bytes[i * 2], 2), to_float(h);
  }
  void* data() { return bytes.empty() ? nullptr : bytes.data(); }
  const void* data() const { return bytes.empty() ? nullptr : bytes.data(); }

  static Tensor poisoned(Dtype dtype, int64_t count) {
    Tensor t;
    t.dtype = dtype;
    t.bytes.resize(size_t(count) * size_of(dtype));
    for (size_t i = 0; i < size_t(count); ++i) t.store(i, nan);
    return t;
  }
  static Tensor normal(Dtype dtype, int64_t count, float mean, float deviation,
                       std::mt19937& random) {
    Tensor t = poisoned(dtype, count);
    std::normal_distribution<float> draw(mean, deviation);
    for (size_t i = 0; i < size_t(count); ++i) {
      t.store(i, draw(random));
      t.values.push_back(t.load(i));
    }
    return t;
  }
};

// No storage, and the values that it stands for.
Tensor absent(Dtype dtype, int64_t count, double value) {
  Tensor t;
  t.dtype = dtype;
  t.values.assign(size_t(count), value);
  return t;
}

// Relative to the largest element of a tensor: four roundings of the storage type, one for each
// stored intermediate that an element passes through; in fp32 the accumulators decide, over sums of
// up to a thousand.
double tolerance(Dtype dtype) {
  return dtype == Dtype::f32 ? 1e-5 : dtype == Dtype::bf16 ? 4 / 256.0 : 4 / 2048.0;
}

void check_close(const char* what, const Tensor& got, const Doubles& want, double tol) {
  double scale = 1e-3;
  for (const double w : want) scale = std::max(scale, std::fabs(w));
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::fabs(got.load(i) - want[i]);
    if (!(error <= tol * scale)) {
      std::cerr << what << "[" << i << "] is " << got.load(i) << ", not " << want[i] << "; dtype "
                << int(got.dtype) << ", " << isa_name(isa()) << "\n";
    }
    CHECK(error <= tol * scale);
  }
}

// Runs f on each level and each way of running threads.
template <class F>
void everywhere(const F& f) {
  for (int level = 0; level <= static_cast<int>(detected_isa()); ++level) {
    CHECK(set_isa(Isa(level)));
    f(Parallel::serial());
    f(std_threads<3>());
  }
  set_isa(detected_isa());
}

constexpr float kGuard = 12345.0f;

std::vector<float> poisoned_workspace(size_t bytes) {
  CHECK_EQ(bytes % sizeof(float), size_t(0));
  std::vector<float> workspace(bytes / sizeof(float) + 1, nan);
  workspace.back() = kGuard;
  return workspace;
}

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

constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16};

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

struct FfnCase {
  Dtype dtype;
  int64_t M, D, F;
  Norm norm;
  Activation activation;
  Placement placement;
  bool residual, biases;
  bool training = true;
  Dropout dropout = kNoDropout, hidden_dropout = kNoDropout;

  double factor(int64_t i, int64_t j) const { return ref_factor(dropout, kOutput, i, j); }
  double hidden_factor(int64_t i, int64_t f) const {
    return ref_factor(hidden_dropout, kHidden, i, f);
  }
};

struct FfnData {
  Tensor x, nw, nb, w1, b1, w2, b2, dy;
  Doubles h, y, s, dx, dnw, dnb, dw1, db1, dw2, db2;

  explicit FfnData(const FfnCase& c) {
    std::mt19937 random(unsigned(c.M * 7 + c.D * 131 + c.F * 1031));
    const int64_t width = is_gated(c.activation) ? 2 * c.F : c.F;
    const auto make = [&](bool wanted, int64_t count, float mean, float deviation) {
      return wanted ? Tensor::normal(c.dtype, count, mean, deviation, random)
                    : absent(c.dtype, count, mean);
    };
    x = make(true, c.M * c.D, 0.3f, 1);
    nw = make(c.biases, c.D, 1, 0.2f);
    nb = make(c.biases, c.D, 0, 0.2f);
    w1 = make(true, width * c.D, 0, 1 / std::sqrt(float(c.D)));
    b1 = make(c.biases, width, 0, 0.5f);
    w2 = make(true, c.D * c.F, 0, 1 / std::sqrt(float(c.F)));
    b2 = make(c.biases, c.D, 0, 0.5f);
    dy = make(true, c.M * c.D, 0, 1);
    forward(c, width);
    backward(c, width);
  }

  // n: what the first product reads.
  Doubles product_input(const FfnCase& c) const {
    Doubles n = x.values;
    for (int64_t i = 0; i < c.M && c.placement == Placement::pre; ++i) {
      ref_norm(x.values.data() + i * c.D, c.D, c.norm, nw.values.data(), nb.values.data(),
               n.data() + i * c.D);
    }
    return n;
  }

  double activated(const FfnCase& c, int64_t width, int64_t i, int64_t f) const {
    const double* row = h.data() + i * width;
    const double value = ref_value(c.activation, row[f]) * c.hidden_factor(i, f);
    return value * (is_gated(c.activation) ? row[c.F + f] : 1);
  }

  void forward(const FfnCase& c, int64_t width) {
    h = ref_product(c.M, width, c.D, product_input(c), c.D, 1, w1.values, 1, c.D);
    for (size_t i = 0; i < h.size(); ++i) h[i] += b1.values[i % size_t(width)];
    Doubles a(size_t(c.M * c.F), 0);
    for (size_t i = 0; i < a.size(); ++i) {
      a[i] = activated(c, width, int64_t(i) / c.F, int64_t(i) % c.F);
    }
    y = ref_product(c.M, c.D, c.F, a, c.F, 1, w2.values, 1, c.F);
    for (size_t i = 0; i < y.size(); ++i) {
      y[i] += b2.values[i % size_t(c.D)];
      y[i] *= c.factor(int64_t(i) / c.D, int64_t(i) % c.D);
      y[i] += c.residual ? x.values[i] : 0;
    }
    s = y;
    for (int64_t i = 0; i < c.M && c.placement == Placement::post; ++i) {
      ref_norm(s.data() + i * c.D, c.D, c.norm, nw.values.data(), nb.values.data(),
               y.data() + i * c.D);
    }
  }

  void backward(const FfnCase& c, int64_t width) {
    dnw.assign(size_t(c.D), 0), dnb = dnw, db2 = dnw, db1.assign(size_t(width), 0);
    Doubles dz = dy.values, a(size_t(c.M * c.F), 0), dh(size_t(c.M * width), 0);
    const auto norm_rows = [&](const Doubles& gradient, const Doubles& v, Doubles& dv) {
      for (int64_t i = 0; i < c.M; ++i) {
        ref_norm_backward(gradient.data() + i * c.D, v.data() + i * c.D, c.D, c.norm,
                          nw.values.data(), dv.data() + i * c.D, dnw.data(), dnb.data());
      }
    };
    if (c.placement == Placement::post) norm_rows(dy.values, s, dz);
    const Doubles ds = dz;
    for (size_t i = 0; i < dz.size(); ++i) dz[i] *= c.factor(int64_t(i) / c.D, int64_t(i) % c.D);
    const Doubles da = ref_product(c.M, c.F, c.D, dz, c.D, 1, w2.values, c.F, 1);
    for (int64_t i = 0; i < c.M; ++i) {
      for (int64_t f = 0; f < c.F; ++f) {
        const double gate = h[size_t(i * width + f)];
        const double d = da[size_t(i * c.F + f)] * c.hidden_factor(i, f);
        const bool gated = is_gated(c.activation);
        const double up = gated ? h[size_t(i * width + c.F + f)] : 1;
        a[size_t(i * c.F + f)] = activated(c, width, i, f);
        dh[size_t(i * width + f)] = d * up * ref_slope(c.activation, gate);
        if (gated) dh[size_t(i * width + c.F + f)] = d * ref_value(c.activation, gate);
      }
    }
    for (size_t i = 0; i < dh.size(); ++i) db1[i % size_t(width)] += dh[i];
    for (size_t i = 0; i < dz.size(); ++i) db2[i % size_t(c.D)] += dz[i];
    dw2 = ref_product(c.D, c.F, c.M, dz, 1, c.D, a, c.F, 1);
    dw1 = ref_product(width, c.D, c.M, dh, 1, width, product_input(c), c.D, 1);
    dx = ref_product(c.M, c.D, width, dh, width, 1, w1.values, c.D, 1);
    if (c.placement == Placement::pre) norm_rows(Doubles(dx), x.values, dx);
    for (size_t i = 0; i < dx.size() && c.residual; ++i) dx[i] += ds[i];
  }
};

// The weight gradients added to fp32 matrices, which are 1 before.
void check_sums(FfnBackwardParams p, Doubles dw1, Doubles dw2, double tol,
                const Parallel& parallel) {
  std::vector<float> w1_sum(dw1.size(), 1.0f), w2_sum(dw2.size(), 1.0f);
  p.dw1 = p.dw2 = nullptr, p.w1_sum = w1_sum.data(), p.w2_sum = w2_sum.data();
  auto room = poisoned_workspace(cpu::ffn_backward_workspace(p, parallel.threads));
  p.workspace = room.data();
  cpu::ffn_backward(p, parallel);
  CHECK_EQ(room.back(), kGuard);
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
      auto room = poisoned_workspace(cpu::ffn_backward_workspace(q, parallel.threads));
      q.workspace = room.data();
      cpu::ffn_backward(q, parallel);
      CHECK_EQ(room.back(), kGuard);
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

constexpr Activation kActivations[] = {Activation::relu, Activation::gelu,   Activation::gelu_tanh,
                                       Activation::silu, Activation::swiglu, Activation::geglu};

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
