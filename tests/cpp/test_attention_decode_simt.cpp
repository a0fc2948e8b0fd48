// Attention's CUDA decode kernels in the emulator against sums in double: contiguous and paged
// caches, spans and no spans, one row and more rows than a block has. What no sequence reaches in
// the caches is NaN, and so are the pages' numbers there none of its pages.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "attention/cuda/kernels.h"
#include "attention_tensor.h"

namespace bigkern::attention {
namespace {

struct Problem {
  std::vector<int> lengths;
  int64_t Hq, Hkv, Sq, D, Dv;
  int page_size = 0;  // 0: contiguous
  int64_t left = kUnlimited, right = 0;
  bool general = false;  // softcap, slopes and sinks
  int gap = 0;
};

template <class T>
struct Case {
  explicit Case(const Problem& p)
      : problem(p),
        B(int64_t(p.lengths.size())),
        longest(*std::max_element(p.lengths.begin(), p.lengths.end())),
        page_size(p.page_size ? p.page_size : longest + 3),
        width((longest + page_size - 1) / page_size + (p.page_size ? 1 : 0)),
        random(1),
        q(B, p.Hq, p.Sq, p.D, p.gap, &random),
        k(B * width, p.Hkv, page_size, p.D, p.gap, nullptr),
        v(B * width, p.Hkv, page_size, p.Dv, p.gap, nullptr),
        o(B, p.Hq, p.Sq, p.Dv, p.gap, nullptr),
        lse(B, p.Hq, p.Sq, 1, 0, nullptr),
        per_head(1, 2, 1, p.Hq, 0, &random),
        lengths(int(B)),
        table(int(B * width)),
        pages(size_t(B * width)) {
    std::iota(pages.begin(), pages.end(), 0);
    if (p.page_size) std::shuffle(pages.begin(), pages.end(), random);
    std::normal_distribution<float> normal;
    for (int64_t b = 0; b < B; ++b) {
      lengths[int(b)] = p.lengths[size_t(b)];
      for (int64_t n = 0; n < width; ++n) {
        const bool used = n * page_size < lengths[int(b)];
        table[int(b * width + n)] = used ? pages[size_t(b * width + n)] : -1;
      }
      for (int64_t j = 0; j < lengths[int(b)]; ++j) {
        for (int64_t h = 0; h < p.Hkv; ++h) {
          for (int64_t d = 0; d < p.D; ++d) {
            k.values[k.index(page(b, j), h, j % page_size, d)] = from_float<T>(normal(random));
          }
          for (int64_t d = 0; d < p.Dv; ++d) {
            v.values[v.index(page(b, j), h, j % page_size, d)] = from_float<T>(normal(random));
          }
        }
      }
    }
    shape.dtype = DtypeOf<T>::value;
    shape.B = B, shape.Hq = p.Hq, shape.Hkv = p.Hkv, shape.Sq = p.Sq, shape.D = p.D,
    shape.Dv = p.Dv;
    shape.Sk = p.page_size ? width * page_size : page_size;
    shape.scale = 0.3f, shape.corner = Corner::bottom_right;
    shape.left = p.left, shape.right = p.right;
    if (!p.general) return;
    shape.softcap = 1.5f;
    shape.slopes = {per_head.values.data(), 0}, shape.sinks = {per_head.values.data() + p.Hq, 0};
  }

  int64_t page(int64_t b, int64_t j) const { return pages[size_t(b * width + j / page_size)]; }

  void run() {
    Buffer<char> workspace(int(cuda::decode_workspace(shape)));
    const Pages paged{table.data(), width, page_size};
    const Decode call{shape,
                      q.template view<const void*>(),
                      k.template view<const void*>(),
                      v.template view<const void*>(),
                      lengths.data(),
                      problem.page_size ? paged : Pages{nullptr, 0, 0},
                      o.template view<void*>(),
                      {lse.values.data(), B == 1 ? 0 : shape.Hq * shape.Sq, shape.Sq},
                      workspace.data()};
    CHECK_EQ(cuda::decode(call, nullptr), 0);
    CHECK(synchronize() == cudaSuccess);
  }

  double score(int64_t b, int64_t h, int64_t i, int64_t j) {
    const int64_t ahead = j - i - (lengths[int(b)] - shape.Sq), h_kv = h / (shape.Hq / shape.Hkv);
    if (ahead > shape.right || -ahead > shape.left) return -INFINITY;
    double x = 0;
    for (int64_t d = 0; d < shape.D; ++d) {
      x += q.at(b, h, i, d) * k.at(page(b, j), h_kv, j % page_size, d);
    }
    x *= shape.scale;
    if (!problem.general) return x;
    const double slope = per_head.at(0, 0, 0, h);
    return shape.softcap * std::tanh(x / shape.softcap) - slope * std::abs(double(ahead));
  }

  void check(double tolerance) {
    for (int64_t n = 0; n < B * shape.Hq * shape.Sq; ++n) {
      const int64_t i = n % shape.Sq, h = n / shape.Sq % shape.Hq, b = n / shape.Sq / shape.Hq;
      const int64_t h_kv = h / (shape.Hq / shape.Hkv);
      double sum = problem.general ? std::exp(per_head.at(0, 1, 0, h)) : 0;
      std::vector<double> right(size_t(shape.Dv));
      for (int64_t j = 0; j < lengths[int(b)]; ++j) {
        const double p = std::exp(score(b, h, i, j));
        sum += p;
        for (int64_t d = 0; d < shape.Dv; ++d) {
          right[d] += p * v.at(page(b, j), h_kv, j % page_size, d);
        }
      }
      expect_near(lse.at(b, h, i, 0), std::log(sum), tolerance);
      for (int64_t d = 0; d < shape.Dv; ++d) {
        expect_near(o.at(b, h, i, d), sum > 0 ? right[d] / sum : 0, tolerance);
      }
    }
  }

  Problem problem;
  int64_t B, longest, page_size, width;
  std::mt19937 random;
  Tensor<T> q, k, v, o;
  Tensor<float> lse, per_head;
  Buffer<int32_t> lengths, table;
  std::vector<int> pages;
  Shape shape{};
};

template <class T>
void expect_right(const Problem& problem, double tolerance) {
  Case<T> call(problem);
  call.run();
  call.check(tolerance);
}

constexpr double kFloat = 1e-5, kHalf = 4e-3, kBrain = 3e-2;

TEST(decode_heads_of_every_width) {
  for (const int64_t D : {1, 64, 72, 128, 200, 256}) {
    expect_right<float>({{300, 0, 17}, 2, 1, 1, D, D}, kFloat);
    expect_right<bf16>({{300, 0, 17}, 2, 1, 1, D, D}, kBrain);
    expect_right<fp16>({{300, 0, 17}, 2, 1, 1, D, D}, kHalf);
  }
}

// One strip of rows, two, four, and more than a block has.
TEST(decode_groups_and_several_queries) {
  for (const auto& [group, Sq] : {std::pair{4, 3}, {8, 4}, {6, 10}, {16, 9}}) {
    expect_right<bf16>({{200, 5}, 2 * group, 2, Sq, 128, 64}, kBrain);
    expect_right<float>({{200, 5}, group, 1, Sq, 72, 200}, kFloat);
  }
}

TEST(decode_pages) {
  for (const int page_size : {1, 7, 16, 64, 500}) {
    expect_right<fp16>({{400, 64, 0, 1}, 4, 2, 2, 64, 64, page_size}, kHalf);
  }
}

TEST(decode_windows) {
  for (const auto& [left, right] : {std::pair{0, 0}, {9, 2}, {130, 0}, {1000, 1}}) {
    expect_right<float>({{600, 3, 90}, 2, 2, 4, 16, 16, 0, left, right}, kFloat);
    expect_right<bf16>({{600, 3, 90}, 2, 2, 4, 16, 16, 32, left, right}, kBrain);
  }
}

TEST(decode_softcap_slopes_and_sinks) {
  expect_right<float>({{300, 0, 40}, 4, 2, 3, 32, 32, 0, 100, 0, true}, kFloat);
  expect_right<bf16>({{300, 0, 40}, 4, 2, 3, 32, 32, 8, kUnlimited, 0, true}, kBrain);
}

// Rows that do not begin at multiples of 16 bytes are copied element by element.
TEST(decode_unaligned_rows) {
  expect_right<bf16>({{70, 9}, 2, 1, 1, 64, 19, 16, kUnlimited, 0, false, 3}, kBrain);
  expect_right<float>({{70, 9}, 2, 1, 1, 33, 64, 0, kUnlimited, 0, false, 1}, kFloat);
}

// Heads of 1024 blocks and more leave the keys whole; few heads cut them, and need a workspace.
TEST(decode_spans_by_size_alone) {
  Shape shape{};
  shape.dtype = Dtype::bf16;
  shape.B = 1, shape.Hq = 32, shape.Hkv = 8, shape.Sq = 1, shape.Sk = 32768;
  shape.D = shape.Dv = 128, shape.left = kUnlimited;
  CHECK_EQ(cuda::decode_workspace(shape), size_t(128) * 32 * (128 + 2) * 4);
  shape.left = 100;  // then 101 keys are seen, less than a span has
  CHECK_EQ(cuda::decode_workspace(shape), size_t(0));
  shape.left = kUnlimited, shape.B = 1024;
  CHECK_EQ(cuda::decode_workspace(shape), size_t(0));
}

}  // namespace
}  // namespace bigkern::attention
