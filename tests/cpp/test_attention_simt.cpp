// Attention's CUDA kernels in the emulator, torch-free: against sums in double, under several
// schedules, and, in an ASan build, with every access checked. tests/attention/test_attention.py
// holds the same kernels to the parity rule; here the tolerances only tell right from wrong.
#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>

#include "attention/cuda/kernels.h"
#include "attention_tensor.h"

namespace bigkern::attention {
namespace {

using Doubles = std::vector<double>;

// The dimensions of [B, Hq, Sq, Sk] that a mask or bias has; in the others it is broadcast.
struct Extent {
  bool given = false, batch = false, head = false, row = false, column = false;
};
const Extent none{}, full{true, true, true, true, true}, keys{true, true, false, false, true},
    heads{true, false, true, true, true}, rows{true, false, true, true, false},
    one{true, false, false, false, false};

struct Problem {
  int64_t B, Hq, Hkv, Sq, Sk, D, Dv;
  int64_t left = kUnlimited, right = kUnlimited;
  Corner corner = Corner::bottom_right;
  Extent mask = none, bias = none;
  float softcap = 0.0f;
  bool sloped = false, sunk = false, dropped = false, dlse = false;
  std::vector<std::pair<int, int>> lengths = {};  // (Sq, Sk) of packed sequences
  int gap = 0;

  Problem with(const std::function<void(Problem&)>& change) const {
    Problem changed = *this;
    change(changed);
    return changed;
  }
};

const Problem plain{1, 2, 2, 40, 50, 24, 24};

Broadcast<const void*> strides_of(const Extent& x, const Problem& p, const void* data) {
  if (!x.given) return {};
  const int64_t column = 1, row = x.column ? p.Sk : 1, head = row * (x.row ? p.Sq : 1),
                batch = head * (x.head ? p.Hq : 1);
  return {data, x.batch ? batch : 0, x.head ? head : 0, x.row ? row : 0, x.column ? column : 0};
}

int64_t at(const Broadcast<const void*>& x, int64_t b, int64_t h, int64_t i, int64_t j) {
  return b * x.batch + h * x.head + i * x.row + j * x.column;
}

// One call, forward and backward, and its inputs.
template <class T>
struct Case {
  explicit Case(const Problem& p)
      : random(1),
        total_q(total(p, true)),
        total_k(total(p, false)),
        batches(p.lengths.empty() ? p.B : 1),
        q(batches, p.Hq, total_q, p.D, p.gap, &random),
        k(batches, p.Hkv, total_k, p.D, p.gap, &random),
        v(batches, p.Hkv, total_k, p.Dv, p.gap, &random),
        dout(batches, p.Hq, total_q, p.Dv, p.gap, &random),
        o(batches, p.Hq, total_q, p.Dv, p.gap, nullptr),
        dq(batches, p.Hq, total_q, p.D, p.gap, nullptr),
        dk(batches, p.Hkv, total_k, p.D, p.gap, nullptr),
        dv(batches, p.Hkv, total_k, p.Dv, p.gap, nullptr),
        lse(batches, p.Hq, total_q, 1, 0, nullptr),
        dlse(batches, p.Hq, total_q, 1, 0, &random),
        bias(1, 1, p.B, p.Hq * p.Sq * p.Sk, 0, &random),
        dbias(1, 1, p.B, p.Hq * p.Sq * p.Sk, 0, nullptr),
        mask(int(p.B * p.Hq * p.Sq * p.Sk)),
        per_head(1, 2, 1, p.Hq, 0, &random),
        begins(int(2 * p.lengths.size() + 2)),
        with_dlse(p.dlse) {
    shape.dtype = DtypeOf<T>::value;
    shape.B = p.B, shape.Hq = p.Hq, shape.Hkv = p.Hkv, shape.D = p.D, shape.Dv = p.Dv;
    shape.Sq = p.Sq, shape.Sk = p.Sk;
    shape.scale = 1.0f / std::sqrt(float(p.D)), shape.softcap = p.softcap;
    shape.corner = p.corner, shape.left = p.left, shape.right = p.right;
    for (int i = 0; i < mask.size(); ++i) mask[i] = random() % 4 != 0;
    for (int j = 0; j < p.Sk && j < mask.size(); ++j) mask[j] = 0;  // the first row sees nothing
    if (p.mask.given) shape.mask = strides_of(p.mask, p, mask.data());
    if (p.bias.given) shape.bias = strides_of(p.bias, p, bias.values.data());
    if (p.sloped) shape.slopes = {per_head.values.data(), 0};
    if (p.sunk) shape.sinks = {per_head.values.data() + p.Hq, 0};
    if (p.dropped) shape.dropout = {12345, 67890, 0x40000000u, 1.0f / 0.75f};
    if (p.lengths.empty()) return;
    const int n = int(p.lengths.size());
    shape.B = n, shape.Sq = 0, shape.Sk = 0;
    begins[0] = begins[n + 1] = 0;
    for (int b = 0; b < n; ++b) {
      const auto [Sq, Sk] = p.lengths[size_t(b)];
      begins[b + 1] = begins[b] + Sq, begins[n + 2 + b] = begins[n + 1 + b] + Sk;
      shape.Sq = std::max<int64_t>(shape.Sq, Sq), shape.Sk = std::max<int64_t>(shape.Sk, Sk);
    }
    shape.q_begins = begins.data(), shape.k_begins = begins.data() + n + 1;
    shape.total_q = begins[n];
  }

  static int64_t total(const Problem& p, bool queries) {
    int64_t sum = p.lengths.empty() ? (queries ? p.Sq : p.Sk) : 0;
    for (const auto& [Sq, Sk] : p.lengths) sum += queries ? Sq : Sk;
    return sum;
  }
  template <class Pointer>
  Statistic<Pointer> statistic(Tensor<float>& x) {
    return {x.values.data(), batches == 1 ? 0 : shape.Hq * total_q, total_q};
  }

  void run() {
    using In = const void*;
    const Forward forward{shape,
                          q.template view<In>(),
                          k.template view<In>(),
                          v.template view<In>(),
                          o.template view<void*>(),
                          statistic<float*>(lse),
                          nullptr};
    CHECK_EQ(cuda::forward(forward, nullptr), 0);
    CHECK(synchronize() == cudaSuccess);
    Buffer<char> workspace(int(cuda::backward_workspace(shape)));
    Backward backward{shape,
                      dout.template view<In>(),
                      q.template view<In>(),
                      k.template view<In>(),
                      v.template view<In>(),
                      o.template view<In>(),
                      statistic<const float*>(lse),
                      {},
                      dq.template view<void*>(),
                      dk.template view<void*>(),
                      dv.template view<void*>(),
                      {},
                      workspace.data()};
    if (with_dlse) backward.dlse = statistic<const float*>(dlse);
    const auto& x = shape.bias;
    if (x.data) backward.dbias = {dbias.values.data(), x.batch, x.head, x.row, x.column};
    CHECK_EQ(cuda::backward(backward, nullptr), 0);
    CHECK(synchronize() == cudaSuccess);
  }

  // A row's scores in double, and what softcap lets through of their gradients.
  void scores(int64_t b, int64_t h, int64_t i, const Sequence& s, Doubles& x, Doubles& through) {
    const int64_t batch = shape.q_begins ? 0 : b, h_kv = h / (shape.Hq / shape.Hkv);
    for (int64_t j = 0; j < s.Sk; ++j) {
      double dot = 0;
      for (int64_t d = 0; d < shape.D; ++d) {
        dot += q.at(batch, h, s.q_begin + i, d) * k.at(batch, h_kv, s.k_begin + j, d);
      }
      x[j] = dot * shape.scale, through[j] = 1;
      if (shape.softcap != 0) {
        const double t = std::tanh(x[j] / shape.softcap);
        x[j] = shape.softcap * t, through[j] = 1 - t * t;
      }
      if (shape.bias.data) x[j] += to_float(bias.values[int(at(shape.bias, b, h, i, j))]);
      const int64_t ahead = j - i - s.offset;
      if (shape.slopes.data) x[j] -= double(shape.slopes.data[h]) * std::abs(double(ahead));
      const bool masked = shape.mask.data && !mask[int(at(shape.mask, b, h, i, j))];
      if (masked || ahead > shape.right || -ahead > shape.left) x[j] = -INFINITY;
    }
  }

  void check(double tolerance) {
    const int64_t group = shape.Hq / shape.Hkv, D = shape.D, Dv = shape.Dv;
    Doubles dk_right(size_t(k.values.size())), dv_right(size_t(v.values.size()));
    Doubles dbias_right(size_t(dbias.values.size()));
    for (int64_t b = 0; b < shape.B; ++b) {
      const Sequence s = shape.sequence(b);
      const int64_t batch = shape.q_begins ? 0 : b;
      Doubles x(s.Sk), through(s.Sk);
      for (int64_t n = 0; n < shape.Hq * s.Sq; ++n) {
        const int64_t h = n / s.Sq, i = n % s.Sq, h_kv = h / group, row = s.q_begin + i;
        scores(b, h, i, s, x, through);
        double sum = shape.sinks.data ? std::exp(double(shape.sinks.data[h])) : 0;
        for (const double score : x) sum += std::exp(score);
        expect_near(lse.at(batch, h, row, 0), std::log(sum), tolerance);
        const DropoutRow draws = shape.dropout.head(uint32_t(b * shape.Hq + h)).row(uint32_t(i));
        double delta = with_dlse ? -dlse.at(batch, h, row, 0) : 0;
        Doubles kept(s.Sk, 1), o_right(Dv), dq_right(D);
        for (int64_t j = 0; j < s.Sk; ++j) {
          x[j] = sum > 0 ? std::exp(x[j]) / sum : 0;
          const bool drop = draws.bits(uint32_t(j)) < shape.dropout.threshold;
          if (shape.dropout.active()) kept[j] = drop ? 0 : shape.dropout.scale;
          for (int64_t d = 0; d < Dv; ++d) {
            o_right[d] += x[j] * kept[j] * v.at(batch, h_kv, s.k_begin + j, d);
            dv_right[v.index(batch, h_kv, s.k_begin + j, d)] +=
                x[j] * kept[j] * dout.at(batch, h, row, d);
          }
        }
        for (int64_t d = 0; d < Dv; ++d) {
          expect_near(o.at(batch, h, row, d), o_right[d], tolerance);
          delta += dout.at(batch, h, row, d) * o_right[d];
        }
        for (int64_t j = 0; j < s.Sk; ++j) {
          double dp = 0;
          for (int64_t d = 0; d < Dv; ++d) {
            dp += dout.at(batch, h, row, d) * v.at(batch, h_kv, s.k_begin + j, d);
          }
          const double ds = x[j] * (kept[j] * dp - delta);
          if (shape.bias.data) dbias_right[at(shape.bias, b, h, i, j)] += ds;
          for (int64_t d = 0; d < D; ++d) {
            const double dx = shape.scale * ds * through[j];
            dq_right[d] += dx * k.at(batch, h_kv, s.k_begin + j, d);
            dk_right[k.index(batch, h_kv, s.k_begin + j, d)] += dx * q.at(batch, h, row, d);
          }
        }
        for (int64_t d = 0; d < D; ++d)
          expect_near(dq.at(batch, h, row, d), dq_right[d], tolerance);
      }
    }
    check_all(dk, dk_right, tolerance);
    check_all(dv, dv_right, tolerance);
    for (int i = 0; shape.bias.data && i < dbias.values.size(); ++i) {
      const double ours = to_float(dbias.values[i]);  // NaN: not part of a broadcast bias
      if (std::isnan(ours)) CHECK_EQ(dbias_right[i], 0.0);
      if (!std::isnan(ours)) expect_near(ours, dbias_right[i], tolerance);
    }
  }

  static void check_all(Tensor<T>& ours, const Doubles& right, double tolerance) {
    for (int i = 0; i < ours.values.size(); ++i) {
      if (i % ours.pitch < ours.D) expect_near(to_float(ours.values[i]), right[i], tolerance);
    }
  }

  Shape shape{};
  std::mt19937 random;
  int64_t total_q, total_k, batches;
  Tensor<T> q, k, v, dout, o, dq, dk, dv;
  Tensor<float> lse, dlse;
  Tensor<T> bias, dbias;
  Buffer<uint8_t> mask;
  Tensor<float> per_head;
  Buffer<int32_t> begins;
  bool with_dlse;
};

template <class T>
void expect_right(const Problem& problem, double tolerance) {
  Case<T> call(problem);
  call.run();
  call.check(tolerance);
}

constexpr double kFloat = 1e-5, kHalf = 6e-3, kBrain = 4e-2;

TEST(attention_heads_of_every_width) {
  for (const int64_t D : {1, 64, 72, 128, 200, 256}) {
    const Problem problem = plain.with([D](Problem& p) { p.D = p.Dv = D, p.Hq = p.Hkv = 1; });
    expect_right<float>(problem, kFloat);
    expect_right<bf16>(problem, kBrain);
    expect_right<fp16>(problem, kHalf);
  }
}

// The general kernels, and those of the bias.
TEST(attention_features_at_every_width) {
  for (const int64_t D : {64, 128, 256}) {
    Problem problem{1, 2, 1, 40, 70, D, D, 30, 10};
    problem.mask = full, problem.bias = heads, problem.softcap = 1.5f;
    problem.sloped = problem.sunk = problem.dropped = problem.dlse = true;
    expect_right<float>(problem, 2 * kFloat);
    expect_right<bf16>(problem, 2 * kBrain);
    expect_right<fp16>(problem, 2 * kHalf);
  }
}

TEST(attention_causal_corners) {
  for (const Corner corner : {Corner::top_left, Corner::bottom_right}) {
    expect_right<float>({1, 1, 1, 130, 70, 16, 16, kUnlimited, 0, corner}, kFloat);
    expect_right<float>({1, 1, 1, 70, 130, 16, 16, kUnlimited, 0, corner}, kFloat);
    expect_right<bf16>({1, 1, 1, 130, 130, 64, 64, kUnlimited, 0, corner}, kBrain);
  }
}

// Windows narrower and wider than tiles, cut off at both ends, and past either end of the keys.
TEST(attention_windows) {
  for (const auto& [left, right] : {std::pair{0, 0}, {5, 3}, {70, 0}, {0, 100}, {200, 64}}) {
    for (const Corner corner : {Corner::top_left, Corner::bottom_right}) {
      expect_right<float>({1, 1, 1, 150, 140, 8, 8, left, right, corner}, kFloat);
      expect_right<bf16>({1, 2, 1, 70, 200, 8, 8, left, right, corner}, kBrain);
    }
  }
}

TEST(attention_groups_and_other_value_width) {
  expect_right<float>({1, 6, 2, 33, 65, 40, 72}, kFloat);
  expect_right<fp16>({2, 3, 1, 65, 33, 72, 40, kUnlimited, 0, Corner::top_left}, kHalf);
}

// Rows that do not begin at multiples of 16 bytes take the element-wise path.
TEST(attention_unaligned_rows) {
  expect_right<bf16>(plain.with([](Problem& p) { p.D = p.Dv = 64, p.gap = 3; }), kBrain);
  expect_right<float>(plain.with([](Problem& p) { p.D = 64, p.Dv = 19, p.gap = 1; }), kFloat);
}

TEST(attention_one_feature_at_a_time) {
  const std::function<void(Problem&)> features[] = {
      [](Problem& p) { p.softcap = 0.7f; },
      [](Problem& p) { p.sloped = true; },
      [](Problem& p) { p.sunk = true, p.Sk = 20, p.right = 0; },  // rows with nothing but a sink
      [](Problem& p) { p.dropped = true; },
      [](Problem& p) { p.dlse = true; },
      [](Problem& p) { p.mask = full; },
  };
  for (const auto& feature : features) {
    expect_right<float>(plain.with(feature), kFloat);
    expect_right<bf16>(plain.with(feature), kBrain);
  }
}

TEST(attention_bias_gradients) {
  for (const Extent& extent : {full, heads, keys, rows, one}) {
    Problem problem{2, 2, 1, 70, 90, 16, 8};
    problem.bias = extent, problem.sunk = true, problem.softcap = 2.0f;
    expect_right<float>(problem, 1e-4);
    problem.left = 20, problem.right = 0;
    expect_right<float>(problem, 1e-4);
  }
}

TEST(attention_packed_sequences) {
  Problem problem = plain.with([](Problem& p) {
    p.Hq = 4, p.lengths = {{5, 9}, {0, 7}, {9, 0}, {133, 70}, {1, 1}, {64, 130}};
  });
  expect_right<float>(problem, kFloat);
  problem.right = 0, problem.left = 40;
  expect_right<bf16>(problem, kBrain);
  problem.corner = Corner::top_left;
  problem.softcap = 1.5f, problem.sloped = problem.sunk = problem.dropped = problem.dlse = true;
  expect_right<float>(problem, kFloat);
}

TEST(attention_all_features) {
  Problem problem{2, 4, 2, 70, 60, 40, 24, 20, 10};
  problem.mask = full, problem.bias = heads, problem.softcap = 1.5f;
  problem.sloped = problem.sunk = problem.dropped = problem.dlse = true;
  expect_right<float>(problem, 1e-4);
  expect_right<fp16>(problem, 2e-2);
}

TEST(attention_mask_with_an_empty_row) {
  Case<float> call(plain.with([](Problem& p) { p.mask = full; }));
  call.run();
  CHECK_EQ(call.lse.at(0, 0, 0, 0), -INFINITY);
  CHECK_EQ(call.o.at(0, 0, 0, 0), 0.0);
  CHECK_EQ(call.dq.at(0, 0, 0, 5), 0.0);
}

TEST(attention_without_keys_or_queries) {
  Case<float> no_keys({1, 1, 1, 5, 0, 16, 16});
  no_keys.run();
  CHECK_EQ(no_keys.lse.at(0, 0, 4, 0), -INFINITY);
  CHECK_EQ(no_keys.o.at(0, 0, 4, 15), 0.0);
  CHECK_EQ(no_keys.dq.at(0, 0, 4, 15), 0.0);
  Case<bf16> no_queries({1, 1, 1, 0, 5, 16, 16});
  no_queries.run();
  CHECK_EQ(no_queries.dk.at(0, 0, 4, 15), 0.0);
  CHECK_EQ(no_queries.dv.at(0, 0, 4, 15), 0.0);
}

// Whatever order the threads run in, the bits are the same.
TEST(attention_is_deterministic) {
  Problem problem{2, 2, 1, 70, 90, 64, 64};
  problem.bias = keys;
  Case<bf16> first(problem), second(problem);
  first.run();
#if defined(BIGKERN_SIMT)
  simt::set_seed(12345);
#endif
  second.run();
  for (int i = 0; i < first.dk.values.size(); ++i) {
    CHECK_EQ(first.dk.values[i].bits, second.dk.values[i].bits);
  }
  for (int i = 0; i < first.dbias.values.size(); ++i) {
    CHECK_EQ(first.dbias.values[i].bits, second.dbias.values[i].bits);
  }
}

TEST(attention_kernels_are_listed) {
  std::vector<KernelInfo> table(100);
  const int count = cuda::kernels(table.data(), 100);
  CHECK_EQ(count, 3 * 18 + 3 + 9 + 9 + 3);  // the passes; delta, dbias, decode, join
  CHECK_EQ(cuda::kernels(table.data(), 1), count);
  for (int i = 0; i < count; ++i) CHECK(table[i].dynamic_smem <= 99 * 1024);
}

}  // namespace
}  // namespace bigkern::attention
