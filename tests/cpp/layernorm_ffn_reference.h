// The feed-forward block in plain loops in double, and the data of its tests: values of one dtype
// as bytes and as the doubles that they mean. Outputs and workspaces start as NaN.
#pragma once

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

using Doubles = std::vector<double>;

const float nan = std::numeric_limits<float>::quiet_NaN();
constexpr float kEps = 1e-5f;
constexpr Dropout kNoDropout = {0, 0, 0, 1.0f};

// ---- the specification, in double ---------------------------------------------------------------

struct RefStats {
  double mean, rstd;
};

inline RefStats ref_stats(const double* v, int64_t N, Norm norm) {
  double mean = 0, variance = 0;
  for (int64_t j = 0; j < N; ++j) mean += norm == Norm::layer ? v[j] / double(N) : 0;
  for (int64_t j = 0; j < N; ++j) variance += (v[j] - mean) * (v[j] - mean) / double(N);
  return {mean, 1 / std::sqrt(variance + double(kEps))};
}

// y = norm(v), and its gradients: dv, dw += , db += .
inline void ref_norm(const double* v, int64_t N, Norm norm, const double* w, const double* b,
                     double* y) {
  const RefStats stats = ref_stats(v, N, norm);
  for (int64_t j = 0; j < N; ++j) y[j] = (v[j] - stats.mean) * stats.rstd * w[j] + b[j];
}

inline void ref_norm_backward(const double* dy, const double* v, int64_t N, Norm norm,
                              const double* w, double* dv, double* dw, double* db) {
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

inline double ref_value(Activation activation, double x) {
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

inline double ref_slope(Activation activation, double x) {
  if (activation == Activation::relu) return x > 0 ? 1 : 0;
  const double h = 1e-5;
  return (ref_value(activation, x + h) - ref_value(activation, x - h)) / (2 * h);
}

// C [M, N] = A [M, K] B [K, N], each read through its strides.
inline Doubles ref_product(int64_t M, int64_t N, int64_t K, const Doubles& A, int64_t a_row,
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
inline double ref_factor(const Dropout& dropout, uint32_t head, int64_t i, int64_t j) {
  const uint32_t bits = dropout.head(head).row(uint32_t(i)).bits(uint32_t(j));
  return bits >= dropout.threshold ? double(dropout.scale) : 0.0;
}

inline Dropout dropout_of(double p) {
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
inline Tensor absent(Dtype dtype, int64_t count, double value) {
  Tensor t;
  t.dtype = dtype;
  t.values.assign(size_t(count), value);
  return t;
}

// Relative to the largest element of a tensor: four roundings of the storage type, one for each
// stored intermediate that an element passes through; in fp32 the accumulators decide, over sums of
// up to a thousand.
inline double tolerance(Dtype dtype) {
  return dtype == Dtype::f32 ? 1e-5 : dtype == Dtype::bf16 ? 4 / 256.0 : 4 / 2048.0;
}

inline void check_close(const char* what, const Tensor& got, const Doubles& want, double tol) {
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
inline void everywhere(const F& f) {
  for (int level = 0; level <= static_cast<int>(detected_isa()); ++level) {
    CHECK(set_isa(Isa(level)));
    f(Parallel::serial());
    f(std_threads<3>());
  }
  set_isa(detected_isa());
}

constexpr float kGuard = 12345.0f;

inline std::vector<float> poisoned_workspace(size_t bytes) {
  CHECK_EQ(bytes % sizeof(float), size_t(0));
  std::vector<float> workspace(bytes / sizeof(float) + 1, nan);
  workspace.back() = kGuard;
  return workspace;
}

constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16};
constexpr Activation kActivations[] = {Activation::relu, Activation::gelu,   Activation::gelu_tanh,
                                       Activation::silu, Activation::swiglu, Activation::geglu};

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
    for (int64_t i = 0; i < c.M && is_pre(c.placement, c.norm); ++i) {
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
    for (int64_t i = 0; i < c.M && is_post(c.placement, c.norm); ++i) {
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
    if (is_post(c.placement, c.norm)) norm_rows(dy.values, s, dz);
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
    if (is_pre(c.placement, c.norm)) norm_rows(Doubles(dx), x.values, dx);
    for (size_t i = 0; i < dx.size() && c.residual; ++i) dx[i] += ds[i];
  }
};

}  // namespace bigkern::layernorm_ffn
