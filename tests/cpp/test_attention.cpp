// The CPU attention kernels against plain loops in double, on every instruction set there is,
// serial and threaded. Tensors have gaps between their rows; outputs, gaps and workspaces start as
// NaN.

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "attention/attention.h"
#include "check.h"
#include "common/cpu/isa.h"
#include "threads.h"

namespace bigkern::attention {
namespace {

using Doubles = std::vector<double>;

const double infinity = std::numeric_limits<double>::infinity();

enum class Mask { none, full, keys };  // keys: one row for all queries
enum class Bias { none, full, keys };

struct Case {
  int64_t B, Hq, Hkv, Sq, Sk, D, Dv;
  Causal causal;
  Mask mask = Mask::none;
  Bias bias = Bias::none;
  double scale = 0.25;

  int64_t entries(bool keys_only) const { return keys_only ? B * Sk : B * Hq * Sq * Sk; }
};

const std::vector<Case> cases = {
    {1, 1, 1, 1, 1, 1, 1, Causal::none},
    {2, 3, 3, 7, 63, 40, 40, Causal::none, Mask::full, Bias::full},
    {1, 4, 2, 65, 129, 64, 64, Causal::none},
    {1, 4, 2, 129, 65, 64, 32, Causal::bottom_right},  // the first rows see nothing
    {2, 2, 1, 65, 129, 17, 33, Causal::bottom_right, Mask::keys, Bias::keys},
    {1, 2, 2, 130, 131, 32, 48, Causal::top_left},
    {1, 2, 1, 100, 70, 5, 1, Causal::top_left, Mask::full, Bias::none},
    {1, 2, 2, 31, 97, 128, 256, Causal::none, Mask::none, Bias::full, -0.3},
    {2, 4, 1, 1, 600, 40, 24, Causal::none, Mask::full, Bias::full},  // decoding, keys in spans
    {1, 6, 2, 1, 77, 256, 128, Causal::bottom_right, Mask::keys, Bias::keys},
    {1, 2, 2, 2, 1, 64, 64, Causal::bottom_right},
    {1, 1, 1, 70, 70, 64, 64, Causal::none, Mask::full, Bias::none, 4.0},  // one key takes it all
    {1, 2, 2, 0, 5, 8, 8, Causal::none},
    {1, 2, 2, 5, 0, 8, 8, Causal::none},
    {1, 2, 2, 70, 0, 8, 8, Causal::none},
    {0, 2, 2, 5, 5, 8, 8, Causal::none},
    {1, 2, 2, 9, 9, 8, 0, Causal::none},
};

// A [B, H, S, D] tensor stored as [B, S, H, D + 3], the gap being NaN.
template <class T>
struct Stored {
  int64_t B, H, S, D;
  std::vector<T> data;

  Stored(int64_t B, int64_t H, int64_t S, int64_t D)
      : B(B), H(H), S(S), D(D), data(size_t(B * S * H * row()), from_float<T>(NAN)) {}

  int64_t row() const { return D + 3; }
  size_t at(int64_t b, int64_t h, int64_t s, int64_t d) const {
    return size_t(((b * S + s) * H + h) * row() + d);
  }
  template <class Pointer>
  View<Pointer> view() {
    return {data.data(), S * H * row(), row(), H * row()};
  }
  void fill(std::mt19937& random) {
    std::normal_distribution<float> normal;
    for_each([&](size_t i, double) { data[i] = from_float<T>(normal(random)); });
  }
  template <class F>
  void for_each(const F& f) const {
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t h = 0; h < H; ++h) {
        for (int64_t s = 0; s < S; ++s) {
          for (int64_t d = 0; d < D; ++d) f(at(b, h, s, d), double(to_float(data[at(b, h, s, d)])));
        }
      }
    }
  }
  Doubles values() const {  // dense [B, H, S, D]
    Doubles x;
    for_each([&](size_t, double value) { x.push_back(value); });
    return x;
  }
  bool gaps_untouched() const {
    for (size_t i = 0; i < data.size(); ++i) {
      if (int64_t(i) % row() >= D && !std::isnan(to_float(data[i]))) return false;
    }
    return true;
  }
};

template <class T>
struct Problem {
  Case c;
  Stored<T> q, k, v, dout;
  std::vector<char> mask;
  std::vector<T> bias;

  explicit Problem(const Case& c, unsigned seed = 1)
      : c(c),
        q(c.B, c.Hq, c.Sq, c.D),
        k(c.B, c.Hkv, c.Sk, c.D),
        v(c.B, c.Hkv, c.Sk, c.Dv),
        dout(c.B, c.Hq, c.Sq, c.Dv),
        mask(size_t(c.entries(c.mask == Mask::keys))),
        bias(size_t(c.entries(c.bias == Bias::keys))) {
    std::mt19937 random(seed);
    for (Stored<T>* x : {&q, &k, &v, &dout}) x->fill(random);
    for (char& x : mask) x = random() % 4 != 0;
    for (T& x : bias) x = from_float<T>(float(random() % 100) / 50 - 1);
    if (c.mask == Mask::full) {  // the last row sees nothing
      for (int64_t j = 0; j < c.Sk; ++j) mask[mask.size() - 1 - size_t(j)] = 0;
    }
  }

  Broadcast broadcast(const void* data, bool keys_only) const {
    if (keys_only) return {data, c.Sk, 0, 0, 1};
    return {data, c.Hq * c.Sq * c.Sk, c.Sq * c.Sk, c.Sk, 1};
  }
  Shape shape() const {
    Shape s{DtypeOf<T>::value, c.B,      c.Hq, c.Hkv, c.Sq, c.Sk, c.D, c.Dv,
            float(c.scale),    c.causal, {},   {}};
    if (c.mask != Mask::none) s.mask = broadcast(mask.data(), c.mask == Mask::keys);
    if (c.bias != Bias::none) s.bias = broadcast(bias.data(), c.bias == Bias::keys);
    return s;
  }
  size_t entry(bool keys_only, int64_t b, int64_t h, int64_t i, int64_t j) const {
    return size_t(keys_only ? b * c.Sk + j : ((b * c.Hq + h) * c.Sq + i) * c.Sk + j);
  }
};

// ---- the specification, in double ---------------------------------------------------------------

struct Results {
  Doubles o, lse, dq, dk, dv;
};

template <class T>
bool sees(const Problem<T>& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  const Shape s = p.shape();
  if (p.c.causal != Causal::none && j > i + s.diagonal()) return false;
  return p.c.mask == Mask::none || p.mask[p.entry(p.c.mask == Mask::keys, b, h, i, j)];
}

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <class T>
Results reference(const Problem<T>& p) {
  const Case& c = p.c;
  const Doubles q = p.q.values(), k = p.k.values(), v = p.v.values(), dout = p.dout.values();
  Results r{Doubles(dout.size()), Doubles(size_t(c.B * c.Hq * c.Sq)), Doubles(q.size()),
            Doubles(k.size()), Doubles(v.size())};
  for (int64_t row = 0; row < c.B * c.Hq * c.Sq; ++row) {
    const int64_t b = row / (c.Hq * c.Sq), h = row / c.Sq % c.Hq, i = row % c.Sq;
    const int64_t first_key = (b * c.Hkv + h / (c.Hq / c.Hkv)) * c.Sk;
    Doubles p_row(size_t(c.Sk), -infinity);
    double max = -infinity, sum = 0;
    for (int64_t j = 0; j < c.Sk; ++j) {
      if (!sees(p, b, h, i, j)) continue;
      double& s = p_row[size_t(j)];
      s = c.scale * dot(&q[size_t(row * c.D)], &k[size_t((first_key + j) * c.D)], c.D);
      if (c.bias != Bias::none) {
        s += double(to_float(p.bias[p.entry(c.bias == Bias::keys, b, h, i, j)]));
      }
      max = std::max(max, s);
    }
    for (double s : p_row) sum += max == -infinity ? 0 : std::exp(s - max);
    r.lse[size_t(row)] = max == -infinity ? -infinity : max + std::log(sum);
    for (double& s : p_row) s = max == -infinity ? 0 : std::exp(s - max) / sum;

    const double* dout_row = dout.data() + row * c.Dv;
    double* o = r.o.data() + row * c.Dv;
    for (int64_t j = 0; j < c.Sk; ++j) {
      for (int64_t d = 0; d < c.Dv; ++d) {
        o[d] += p_row[size_t(j)] * v[size_t((first_key + j) * c.Dv + d)];
        r.dv[size_t((first_key + j) * c.Dv + d)] += p_row[size_t(j)] * dout_row[d];
      }
    }
    const double delta = dot(dout_row, o, c.Dv);
    for (int64_t j = 0; j < c.Sk; ++j) {
      const size_t key = size_t(first_key + j);
      const double dp = dot(dout_row, v.data() + key * size_t(c.Dv), c.Dv);
      const double ds = c.scale * p_row[size_t(j)] * (dp - delta);
      for (int64_t d = 0; d < c.D; ++d) {
        r.dq[size_t(row * c.D + d)] += ds * k[key * size_t(c.D) + size_t(d)];
        r.dk[key * size_t(c.D) + size_t(d)] += ds * q[size_t(row * c.D + d)];
      }
    }
  }
  return r;
}

// ---- the kernels --------------------------------------------------------------------------------

// Workspace of exactly the size asked for, all NaN, with a guard behind it.
struct Workspace {
  std::vector<float> data;
  size_t floats;

  explicit Workspace(size_t bytes) : data(bytes / 4 + 16, NAN), floats(bytes / 4) {
    std::fill(data.begin() + std::ptrdiff_t(floats), data.end(), 123.0f);
  }
  bool overrun() const {
    return std::any_of(data.begin() + std::ptrdiff_t(floats), data.end(),
                       [](float x) { return x != 123.0f; });
  }
};

template <class T>
Results kernels(Problem<T> p, const Parallel& parallel) {
  const Case& c = p.c;
  const Shape s = p.shape();
  Stored<T> o(c.B, c.Hq, c.Sq, c.Dv), dq(c.B, c.Hq, c.Sq, c.D), dk(c.B, c.Hkv, c.Sk, c.D),
      dv(c.B, c.Hkv, c.Sk, c.Dv);
  std::vector<float> lse(size_t(c.B * c.Hq * c.Sq), NAN);
  using In = const void*;
  const View<In> q = p.q.template view<In>(), k = p.k.template view<In>(),
                 v = p.v.template view<In>();

  Workspace forward(cpu::forward_workspace(s, parallel.threads));
  cpu::forward({s, q, k, v, o.template view<void*>(), lse.data(), forward.data.data()}, parallel);
  CHECK(!forward.overrun() && o.gaps_untouched());

  Workspace backward(cpu::backward_workspace(s, parallel.threads));
  cpu::backward({s, p.dout.template view<In>(), q, k, v, o.template view<In>(), lse.data(),
                 dq.template view<void*>(), dk.template view<void*>(), dv.template view<void*>(),
                 backward.data.data()},
                parallel);
  CHECK(!backward.overrun() && dq.gaps_untouched() && dk.gaps_untouched() && dv.gaps_untouched());
  return {o.values(), Doubles(lse.begin(), lse.end()), dq.values(), dk.values(), dv.values()};
}

bool close(const Doubles& ours, const Doubles& wanted, double tolerance, const char* name) {
  double scale = 1;
  for (double x : wanted) scale = std::max(scale, std::isfinite(x) ? std::abs(x) : 0);
  CHECK_EQ(ours.size(), wanted.size());
  for (size_t i = 0; i < ours.size(); ++i) {
    const bool same = ours[i] == wanted[i] || std::abs(ours[i] - wanted[i]) <= tolerance * scale;
    if (same) continue;
    std::cerr << name << "[" << i << "] is " << ours[i] << ", not " << wanted[i] << "\n";
    return false;
  }
  return true;
}

template <class T>
void check_all(double tolerance) {
  for (size_t i = 0; i < cases.size(); ++i) {
    const Problem<T> p(cases[i], unsigned(i + 1));
    const Results wanted = reference(p);
    for (int level = 0; level <= int(detected_isa()); ++level) {
      CHECK(set_isa(Isa(level)));
      for (const Parallel& parallel : {Parallel::serial(), std_threads<3>(), std_threads<16>()}) {
        const Results ours = kernels(p, parallel);
        const bool right = close(ours.o, wanted.o, tolerance, "o") &&
                           close(ours.lse, wanted.lse, 1e-5, "lse") &&
                           close(ours.dq, wanted.dq, tolerance, "dq") &&
                           close(ours.dk, wanted.dk, tolerance, "dk") &&
                           close(ours.dv, wanted.dv, tolerance, "dv");
        if (!right) {
          std::cerr << "case " << i << " on " << isa_name(isa()) << " with " << parallel.threads
                    << " threads\n";
        }
        CHECK(right);
      }
    }
  }
}

}  // namespace

TEST(attention_f32_is_right) { check_all<float>(1e-5); }
TEST(attention_bf16_is_right) { check_all<bf16>(2e-2); }
TEST(attention_f16_is_right) { check_all<fp16>(3e-3); }

TEST(attention_is_the_same_every_time) {
  set_isa(detected_isa());
  const Problem<float> p({1, 4, 1, 200, 300, 64, 64, Causal::top_left});
  const Results first = kernels(p, std_threads<5>());
  for (int i = 0; i < 5; ++i) {
    const Results again = kernels(p, std_threads<5>());
    CHECK(first.o == again.o && first.dq == again.dq && first.dk == again.dk &&
          first.dv == again.dv);
  }
}

// More keys than one block and scores far apart: the sums must be rescaled, never overflow.
TEST(attention_of_large_scores_is_finite) {
  Case c{1, 1, 1, 70, 200, 16, 16, Causal::none};
  c.scale = 3000;
  const Problem<float> p(c);
  for (int level = 0; level <= int(detected_isa()); ++level) {
    CHECK(set_isa(Isa(level)));
    const Results ours = kernels(p, Parallel::serial());
    for (const Doubles* x : {&ours.o, &ours.lse, &ours.dq, &ours.dk, &ours.dv}) {
      for (double value : *x) CHECK(std::isfinite(value));
    }
  }
}

}  // namespace bigkern::attention
