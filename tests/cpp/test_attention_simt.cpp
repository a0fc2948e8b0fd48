// Attention's CUDA kernels in the emulator, torch-free: against sums in double, under several
// schedules, and, in an ASan build, with every access checked. tests/test_attention.py holds the
// same kernels to the parity rule; here the tolerances only tell right from wrong.
#include <cmath>
#include <random>

#include "attention/attention.h"
#include "attention/kernels.h"
#include "check.h"
#include "device.h"

namespace bigkern::attention {
namespace {

// A [B, H, S, D] tensor of random numbers, or of NaN, with `gap` unused elements after each row.
template <class T>
struct Tensor {
  Tensor(int64_t B, int64_t H, int64_t S, int64_t D, int gap, std::mt19937* random)
      : H(H), S(S), pitch(D + gap), values(int(B * H * S * (D + gap))) {
    std::normal_distribution<float> normal;
    for (int i = 0; random && i < values.size(); ++i) values[i] = from_float<T>(normal(*random));
  }
  double at(int64_t b, int64_t h, int64_t s, int64_t d) {
    return to_float(values[int(((b * H + h) * S + s) * pitch + d)]);
  }
  template <class Pointer>
  View<Pointer> view() {
    return {values.data(), H * S * pitch, S * pitch, pitch};
  }

  int64_t H, S, pitch;
  Buffer<T> values;
};

// One call, forward and backward, and its inputs.
template <class T>
struct Case {
  explicit Case(Shape shape_, int gap = 0, unsigned seed = 1)
      : shape(shape_),
        random(seed),
        q(shape.B, shape.Hq, shape.Sq, shape.D, gap, &random),
        k(shape.B, shape.Hkv, shape.Sk, shape.D, gap, &random),
        v(shape.B, shape.Hkv, shape.Sk, shape.Dv, gap, &random),
        dout(shape.B, shape.Hq, shape.Sq, shape.Dv, gap, &random),
        o(shape.B, shape.Hq, shape.Sq, shape.Dv, gap, nullptr),
        dq(shape.B, shape.Hq, shape.Sq, shape.D, gap, nullptr),
        dk(shape.B, shape.Hkv, shape.Sk, shape.D, gap, nullptr),
        dv(shape.B, shape.Hkv, shape.Sk, shape.Dv, gap, nullptr),
        lse(int(shape.B * shape.Hq * shape.Sq)) {
    shape.dtype = DtypeOf<T>::value;
    shape.scale = 1.0f / std::sqrt(float(shape.D));
  }

  void run() {
    using In = const void*;
    const Forward forward{shape,
                          q.template view<In>(),
                          k.template view<In>(),
                          v.template view<In>(),
                          o.template view<void*>(),
                          lse.data(),
                          nullptr};
    CHECK_EQ(cuda::forward(forward, nullptr), 0);
    CHECK(synchronize() == cudaSuccess);
    Buffer<char> workspace(int(cuda::backward_workspace(shape)));
    const Backward backward{shape,
                            dout.template view<In>(),
                            q.template view<In>(),
                            k.template view<In>(),
                            v.template view<In>(),
                            o.template view<In>(),
                            lse.data(),
                            dq.template view<void*>(),
                            dk.template view<void*>(),
                            dv.template view<void*>(),
                            workspace.data()};
    CHECK_EQ(cuda::backward(backward, nullptr), 0);
    CHECK(synchronize() == cudaSuccess);
  }

  bool sees(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (shape.causal != Causal::none && j > i + shape.diagonal()) return false;
    const Broadcast& m = shape.mask;
    const auto* bytes = static_cast<const uint8_t*>(m.data);
    return !bytes || bytes[b * m.batch + h * m.head + i * m.row + j * m.column] != 0;
  }

  // p of one row, in double; returns its log-sum-exp.
  double softmax(int64_t b, int64_t h, int64_t i, std::vector<double>& p) {
    const int64_t h_kv = h / (shape.Hq / shape.Hkv);
    double sum = 0;
    for (int64_t j = 0; j < shape.Sk; ++j) {
      double s = 0;
      for (int64_t d = 0; d < shape.D; ++d) s += q.at(b, h, i, d) * k.at(b, h_kv, j, d);
      p[j] = sees(b, h, i, j) ? std::exp(s * shape.scale) : 0;
      sum += p[j];
    }
    for (double& x : p) x = sum > 0 ? x / sum : 0;
    return std::log(sum);
  }

  void check(double tolerance) {
    const auto near = [&](double ours, double right) {
      CHECK(std::abs(ours - right) <= tolerance * (1 + std::abs(right)));
    };
    const int64_t group = shape.Hq / shape.Hkv, D = shape.D, Dv = shape.Dv, Sk = shape.Sk;
    std::vector<double> p(Sk), ds(Sk);
    for (int64_t b = 0; b < shape.B; ++b) {
      for (int64_t h_kv = 0; h_kv < shape.Hkv; ++h_kv) {
        std::vector<double> dk_row(Sk * D), dv_row(Sk * Dv);
        for (int64_t h = h_kv * group; h < (h_kv + 1) * group; ++h) {
          for (int64_t i = 0; i < shape.Sq; ++i) {
            const double row_lse = softmax(b, h, i, p);
            const double ours = lse[int((b * shape.Hq + h) * shape.Sq + i)];
            CHECK(ours == row_lse || std::abs(ours - row_lse) <= tolerance);
            double delta = 0;
            for (int64_t d = 0; d < Dv; ++d) {
              double right = 0;
              for (int64_t j = 0; j < Sk; ++j) {
                right += p[j] * v.at(b, h_kv, j, d);
                dv_row[j * Dv + d] += p[j] * dout.at(b, h, i, d);
              }
              near(o.at(b, h, i, d), right);
              delta += dout.at(b, h, i, d) * right;
            }
            for (int64_t j = 0; j < Sk; ++j) {
              double dp = 0;
              for (int64_t d = 0; d < Dv; ++d) dp += dout.at(b, h, i, d) * v.at(b, h_kv, j, d);
              ds[j] = shape.scale * p[j] * (dp - delta);
            }
            for (int64_t d = 0; d < D; ++d) {
              double right = 0;
              for (int64_t j = 0; j < Sk; ++j) {
                right += ds[j] * k.at(b, h_kv, j, d);
                dk_row[j * D + d] += ds[j] * q.at(b, h, i, d);
              }
              near(dq.at(b, h, i, d), right);
            }
          }
        }
        for (int64_t j = 0; j < Sk; ++j) {
          for (int64_t d = 0; d < D; ++d) near(dk.at(b, h_kv, j, d), dk_row[j * D + d]);
          for (int64_t d = 0; d < Dv; ++d) near(dv.at(b, h_kv, j, d), dv_row[j * Dv + d]);
        }
      }
    }
  }

  Shape shape;
  std::mt19937 random;
  Tensor<T> q, k, v, dout, o, dq, dk, dv;
  Buffer<float> lse;
};

Shape make_shape(int64_t Hq, int64_t Hkv, int64_t Sq, int64_t Sk, int64_t D, int64_t Dv,
                 Causal causal = Causal::none) {
  Shape shape{};
  shape.B = 1;
  shape.Hq = Hq, shape.Hkv = Hkv, shape.Sq = Sq, shape.Sk = Sk, shape.D = D, shape.Dv = Dv;
  shape.causal = causal;
  return shape;
}

template <class T>
void expect_right(const Shape& shape, double tolerance, int gap = 0) {
  Case<T> call(shape, gap);
  call.run();
  call.check(tolerance);
}

constexpr double kFloat = 1e-5, kHalf = 4e-3, kBrain = 3e-2;

TEST(attention_heads_of_every_width) {
  for (const int64_t D : {1, 64, 72, 128, 200, 256}) {
    expect_right<float>(make_shape(1, 1, 40, 50, D, D), kFloat);
    expect_right<bf16>(make_shape(1, 1, 40, 50, D, D), kBrain);
    expect_right<fp16>(make_shape(1, 1, 40, 50, D, D), kHalf);
  }
}

TEST(attention_causal_corners) {
  for (const Causal causal : {Causal::top_left, Causal::bottom_right}) {
    expect_right<float>(make_shape(1, 1, 130, 70, 16, 16, causal), kFloat);
    expect_right<float>(make_shape(1, 1, 70, 130, 16, 16, causal), kFloat);
    expect_right<bf16>(make_shape(1, 1, 130, 130, 64, 64, causal), kBrain);
  }
}

TEST(attention_groups_and_other_value_width) {
  expect_right<float>(make_shape(6, 2, 33, 65, 40, 72), kFloat);
  expect_right<fp16>(make_shape(3, 1, 65, 33, 72, 40, Causal::top_left), kHalf);
}

// Rows that do not begin at multiples of 16 bytes take the element-wise path.
TEST(attention_unaligned_rows) {
  expect_right<bf16>(make_shape(2, 1, 35, 37, 64, 64), kBrain, 3);
  expect_right<float>(make_shape(2, 1, 35, 37, 64, 19), kFloat, 1);
}

TEST(attention_mask_with_an_empty_row) {
  Shape shape = make_shape(2, 1, 20, 37, 24, 24);
  std::vector<uint8_t> mask(20 * 37);
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = i / 37 != 3 && i % 3 != 0;
  shape.mask = {mask.data(), 0, 0, 37, 1};
  Case<float> call(shape);
  call.run();
  call.check(kFloat);
  CHECK_EQ(call.lse[3], -INFINITY);
  CHECK_EQ(call.o.at(0, 0, 3, 0), 0.0);
  CHECK_EQ(call.dq.at(0, 1, 3, 5), 0.0);
}

TEST(attention_without_keys_or_queries) {
  Case<float> no_keys(make_shape(1, 1, 5, 0, 16, 16));
  no_keys.run();
  CHECK_EQ(no_keys.lse[4], -INFINITY);
  CHECK_EQ(no_keys.o.at(0, 0, 4, 15), 0.0);
  CHECK_EQ(no_keys.dq.at(0, 0, 4, 15), 0.0);
  Case<bf16> no_queries(make_shape(1, 1, 0, 5, 16, 16));
  no_queries.run();
  CHECK_EQ(no_queries.dk.at(0, 0, 4, 15), 0.0);
  CHECK_EQ(no_queries.dv.at(0, 0, 4, 15), 0.0);
}

// Whatever order the threads run in, the bits are the same.
TEST(attention_is_deterministic) {
  Case<bf16> first(make_shape(2, 1, 70, 90, 64, 64)), second(make_shape(2, 1, 70, 90, 64, 64));
  first.run();
#if defined(BIGKERN_SIMT)
  simt::set_seed(12345);
#endif
  second.run();
  for (int64_t j = 0; j < 90; ++j) {
    for (int64_t d = 0; d < 64; ++d) CHECK_EQ(first.dk.at(0, 0, j, d), second.dk.at(0, 0, j, d));
  }
}

TEST(attention_kernels_are_listed) {
  std::vector<KernelInfo> table(100);
  const int count = cuda::kernels(table.data(), 100);
  CHECK_EQ(count, 3 * 18 + 3);
  CHECK_EQ(cuda::kernels(table.data(), 1), count);
  for (int i = 0; i < count; ++i) CHECK(table[i].dynamic_smem <= 99 * 1024);
}

}  // namespace
}  // namespace bigkern::attention
