// The CPU attention kernels against plain loops in double, on every instruction set there is,
// serial and threaded. Tensors have gaps between their rows; outputs, gaps and workspaces start as
// NaN.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>

#include "attention/attention.h"
#include "check.h"
#include "common/cpu/isa.h"
#include "threads.h"

namespace bigkern::attention {
namespace {

using Doubles = std::vector<double>;
using Lengths = std::vector<std::pair<int, int>>;  // (Sq, Sk) of packed sequences

const double infinity = std::numeric_limits<double>::infinity();

// The dimensions of [B, Hq, Sq, Sk] that a mask or a bias has; in the others it is broadcast.
struct Extent {
  bool given = false, batch = false, head = false, row = false, column = false;
};
const Extent none{}, full{true, true, true, true, true}, keys{true, true, false, false, true},
    heads{true, false, true, true, true}, rows{true, false, true, true, false};

struct Case {
  int64_t B, Hq, Hkv, Sq, Sk, D, Dv;
  Extent mask = none, bias = none;
  Corner corner = Corner::bottom_right;
  int64_t left = kUnlimited, right = kUnlimited;
  double scale = 0.25;
  bool capped = false, sloped = false, sunk = false, dropped = false, dlse = false;
  Lengths lengths = {};

  Case with(const std::function<void(Case&)>& change) const {
    Case changed = *this;
    change(changed);
    return changed;
  }
};

const Case plain{1, 4, 2, 65, 129, 40, 24};
const Corner top_left = Corner::top_left;

const std::vector<Case> cases = {
    {1, 1, 1, 1, 1, 1, 1},
    {2, 3, 3, 7, 63, 40, 40, full, full},
    {1, 4, 2, 65, 129, 64, 64},
    {1, 4, 2, 129, 65, 64, 32, none, none, Corner::bottom_right, kUnlimited,
     0},  // rows see nothing
    {2, 2, 1, 65, 129, 17, 33, keys, keys, Corner::bottom_right, kUnlimited, 0},
    {1, 2, 2, 130, 131, 32, 48, none, none, top_left, kUnlimited, 0},
    {1, 2, 1, 100, 70, 5, 1, full, none, top_left, kUnlimited, 0},
    {1, 2, 2, 31, 97, 128, 256, none, full, top_left, kUnlimited, kUnlimited, -0.3},
    {2, 4, 1, 1, 600, 40, 24, full, full},  // few rows, keys in parts
    {1, 6, 2, 1, 77, 256, 128, keys, keys, Corner::bottom_right, kUnlimited, 0},
    {1, 2, 2, 2, 1, 64, 64, none, none, Corner::bottom_right, kUnlimited, 0},
    {1, 1, 1, 70, 70, 64, 64, full, none, top_left, kUnlimited, kUnlimited,
     4.0},                        // one key takes all
    {1, 2, 1, 10, 1500, 16, 16},  // tiles in parts
    {1, 2, 2, 0, 5, 8, 8},
    {1, 2, 2, 5, 0, 8, 8, none, rows},
    {1, 2, 2, 70, 0, 8, 8},
    {0, 2, 2, 5, 5, 8, 8, none, heads},
    {1, 2, 2, 9, 9, 8, 0},
    // windows
    {1, 2, 2, 150, 150, 8, 8, none, none, top_left, 20, 3},
    {1, 4, 1, 70, 300, 8, 8, none, none, Corner::bottom_right, 40, 0},  // two heads in a tile
    {1, 2, 2, 200, 60, 8, 8, none, none, top_left, 10, kUnlimited},     // the last rows see nothing
    {1, 2, 1, 2, 700, 8, 8, none, none, Corner::bottom_right, 300, 1},
    {1, 2, 2, 80, 80, 8, 8, full, full, top_left, 0, 0},
    // features, alone and together
    plain.with([](Case& c) { c.capped = true; }),
    plain.with([](Case& c) { c.sloped = true; }),
    plain.with([](Case& c) { c.sunk = true; }),
    plain.with([](Case& c) { c.sunk = true, c.Sk = 20, c.right = 0; }),
    plain.with([](Case& c) { c.dropped = true; }),
    plain.with([](Case& c) { c.dlse = true; }),
    plain.with([](Case& c) { c.bias = heads, c.B = 3; }),
    plain.with([](Case& c) { c.bias = rows, c.sunk = true; }),
    plain.with([](Case& c) { c.bias = keys, c.mask = rows, c.B = 2, c.Sk = 300; }),
    plain.with([](Case& c) {
      c.B = 2, c.bias = heads, c.mask = full, c.left = 30, c.right = 5;
      c.capped = c.sloped = c.sunk = c.dropped = c.dlse = true;
    }),
    plain.with([](Case& c) {
      c.Sq = 1, c.Sk = 700, c.bias = keys, c.left = 600;
      c.capped = c.sloped = c.sunk = c.dropped = c.dlse = true;
    }),
    // packed sequences: many short ones, a long one among short ones
    plain.with([](Case& c) { c.lengths = {{5, 9}, {0, 7}, {9, 0}, {33, 70}, {1, 1}, {70, 33}}; }),
    plain.with([](Case& c) {
      c.lengths = {{3, 3}, {400, 400}, {2, 600}, {3, 3}}, c.Hq = c.Hkv = 1, c.right = 0;
    }),
    plain.with([](Case& c) {
      c.lengths = {{20, 30}, {0, 4}, {90, 90}}, c.left = 25, c.right = 0, c.corner = top_left;
      c.capped = c.sloped = c.sunk = c.dropped = c.dlse = true;
    }),
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
    return {data.data(), B == 1 ? 0 : S * H * row(), row(), H * row()};
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

// A dense [B or 1, Hq or 1, Sq or 1, Sk or 1] tensor.
template <class T>
struct Entries {
  Extent extent;
  int64_t batch, head, row, column;  // strides
  std::vector<T> data;

  Entries(const Extent& e, int64_t B, int64_t H, int64_t Sq, int64_t Sk) : extent(e) {
    const int64_t columns = e.column ? Sk : 1, rows = e.row ? Sq : 1, heads = e.head ? H : 1;
    batch = e.batch ? heads * rows * columns : 0, head = e.head ? rows * columns : 0;
    row = e.row ? columns : 0, column = e.column ? 1 : 0;
    if (e.given) data.resize(size_t((e.batch ? B : 1) * heads * rows * columns));
  }
  size_t at(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return size_t(b * batch + h * head + i * row + j * column);
  }
  template <class Pointer>
  Broadcast<Pointer> broadcast(Pointer pointer) const {
    if (!extent.given) return {nullptr, 0, 0, 0, 0};
    return {pointer, batch, head, row, column};
  }
};

template <class T>
struct Problem {
  Case c;
  int64_t B, q_rows, k_rows;  // of the tensors: packed sequences lie in one batch
  std::vector<int32_t> q_begins, k_begins;
  Stored<T> q, k, v, dout;
  Entries<char> mask;
  Entries<T> bias;
  std::vector<float> slopes, sinks, dlse;

  explicit Problem(const Case& case_, unsigned seed = 1)
      : c(case_),
        B(c.lengths.empty() ? c.B : 1),
        q_rows(c.lengths.empty() ? c.Sq : 0),
        k_rows(c.lengths.empty() ? c.Sk : 0),
        q_begins(pack(c.lengths, true, &q_rows)),
        k_begins(pack(c.lengths, false, &k_rows)),
        q(B, c.Hq, q_rows, c.D),
        k(B, c.Hkv, k_rows, c.D),
        v(B, c.Hkv, k_rows, c.Dv),
        dout(B, c.Hq, q_rows, c.Dv),
        mask(c.mask, c.B, c.Hq, c.Sq, c.Sk),
        bias(c.bias, c.B, c.Hq, c.Sq, c.Sk) {
    if (!c.lengths.empty()) c.B = int64_t(c.lengths.size());
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (Stored<T>* x : {&q, &k, &v, &dout}) x->fill(random);
    for (char& x : mask.data) x = random() % 4 != 0;
    for (T& x : bias.data) x = from_float<T>(normal(random));
    if (c.mask.row && c.mask.column) {  // the last row sees nothing
      for (int64_t j = 0; j < c.Sk; ++j) mask.data[mask.data.size() - 1 - size_t(j)] = 0;
    }
    if (c.sloped) slopes.resize(size_t(c.B * c.Hq));
    if (c.sunk) sinks.resize(size_t(c.Hq));
    if (c.dlse) dlse.resize(size_t(B * c.Hq * q_rows));
    for (float& x : slopes) x = 0.1f * std::abs(normal(random));
    for (std::vector<float>* x : {&sinks, &dlse}) {
      for (float& value : *x) value = normal(random);
    }
  }

  static std::vector<int32_t> pack(const Lengths& lengths, bool of_q, int64_t* total) {
    if (lengths.empty()) return {};
    std::vector<int32_t> begins{0};
    for (auto [Sq, Sk] : lengths) begins.push_back(begins.back() + (of_q ? Sq : Sk));
    *total = begins.back();
    return begins;
  }

  Shape shape() const {
    Shape s{};
    s.dtype = DtypeOf<T>::value;
    s.B = c.B, s.Hq = c.Hq, s.Hkv = c.Hkv, s.Sq = c.Sq, s.Sk = c.Sk, s.D = c.D, s.Dv = c.Dv;
    for (auto [Sq, Sk] : c.lengths) {
      s.Sq = std::max<int64_t>(s.Sq, Sq), s.Sk = std::max<int64_t>(s.Sk, Sk);
    }
    s.scale = float(c.scale), s.softcap = c.capped ? 1.5f : 0;
    s.corner = c.corner, s.left = c.left, s.right = c.right;
    s.mask = mask.template broadcast<const void*>(mask.data.data());
    s.bias = bias.template broadcast<const void*>(bias.data.data());
    if (c.sloped) s.slopes = {slopes.data(), c.Hq};
    if (c.sunk) s.sinks = {sinks.data(), 0};
    s.dropout = {123u, 0x87654321u, c.dropped ? 1u << 30 : 0, c.dropped ? 4.0f / 3 : 1.0f};
    if (!c.lengths.empty()) s.q_begins = q_begins.data(), s.k_begins = k_begins.data();
    return s;
  }
};

// ---- the specification, in double ---------------------------------------------------------------

struct Results {
  Doubles o, lse, dq, dk, dv, dbias;
};

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// What makes the score of query i and key j of a sequence, and what it makes.
struct Score {
  double s = -infinity, slope = 1;  // slope: of the softcap
  double kept = 1;                  // dropout's factor
};

template <class T>
Score score(const Problem<T>& p, int64_t b, int64_t h, int64_t i, int64_t j, int64_t offset,
            double product) {
  const Case& c = p.c;
  const Shape s = p.shape();
  const int64_t place = i + offset;
  Score score;
  if (c.dropped) {
    const DropoutRow row = s.dropout.head(uint32_t(b * c.Hq + h)).row(uint32_t(i));
    score.kept = row.bits(uint32_t(j)) >= s.dropout.threshold ? 4.0 / 3 : 0;
  }
  if (j < place - c.left || j > place + c.right) return score;
  if (c.mask.given && !p.mask.data[p.mask.at(b, h, i, j)]) return score;
  score.s = product;
  if (c.capped) {
    score.s = 1.5 * std::tanh(product / 1.5);
    score.slope = 1 - score.s * score.s / 2.25;
  }
  if (c.bias.given) score.s += double(to_float(p.bias.data[p.bias.at(b, h, i, j)]));
  if (c.sloped) score.s -= double(p.slopes[size_t(b * c.Hq + h)]) * double(std::abs(place - j));
  return score;
}

// One row: query i of head h in sequence b.
template <class T>
void reference_row(const Problem<T>& p, const Doubles (&x)[4], int64_t b, int64_t h, int64_t i,
                   Results& r) {
  const Case& c = p.c;
  const auto& [q, k, v, dout] = x;
  const Sequence seq = p.shape().sequence(b);
  const int64_t batch = c.lengths.empty() ? b : 0;
  const size_t row = size_t((batch * c.Hq + h) * p.q_rows + seq.q_begin + i);
  const size_t first_key = size_t((batch * c.Hkv + h / (c.Hq / c.Hkv)) * p.k_rows + seq.k_begin);
  const size_t D = size_t(c.D), Dv = size_t(c.Dv), n = size_t(seq.Sk);

  std::vector<Score> scores(n);
  double max = c.sunk ? double(p.sinks[size_t(h)]) : -infinity, sum = c.sunk ? 1 : 0;
  for (size_t j = 0; j < n; ++j) {
    const double product = c.scale * dot(&q[row * D], &k[(first_key + j) * D], c.D);
    scores[j] = score(p, b, h, i, int64_t(j), seq.offset, product);
    if (scores[j].s <= max) {
      sum += max == -infinity ? 0 : std::exp(scores[j].s - max);
    } else {
      sum = sum * std::exp(max - scores[j].s) + 1;
      max = scores[j].s;
    }
  }
  r.lse[row] = max + std::log(sum);
  Doubles weights(n);
  for (size_t j = 0; j < n; ++j) {
    weights[j] = max == -infinity ? 0 : std::exp(scores[j].s - max) / sum;
  }

  const double* dout_row = dout.data() + row * Dv;
  for (size_t j = 0; j < n; ++j) {
    for (size_t d = 0; d < Dv; ++d) {
      const double dropped = weights[j] * scores[j].kept;
      r.o[row * Dv + d] += dropped * v[(first_key + j) * Dv + d];
      r.dv[(first_key + j) * Dv + d] += dropped * dout_row[d];
    }
  }
  const double delta =
      dot(dout_row, r.o.data() + row * Dv, c.Dv) - (c.dlse ? double(p.dlse[row]) : 0);
  for (size_t j = 0; j < n; ++j) {
    const size_t key = first_key + j;
    const double dp = dot(dout_row, v.data() + key * Dv, c.Dv) * scores[j].kept;
    const double ds = weights[j] * (dp - delta);
    if (c.bias.given) r.dbias[p.bias.at(b, h, i, int64_t(j))] += ds;
    for (size_t d = 0; d < D; ++d) {
      r.dq[row * D + d] += c.scale * ds * scores[j].slope * k[key * D + d];
      r.dk[key * D + d] += c.scale * ds * scores[j].slope * q[row * D + d];
    }
  }
}

template <class T>
Results reference(const Problem<T>& p) {
  const Case& c = p.c;
  const Doubles x[4] = {p.q.values(), p.k.values(), p.v.values(), p.dout.values()};
  Results r{Doubles(x[3].size()), Doubles(size_t(p.B * c.Hq * p.q_rows)),
            Doubles(x[0].size()), Doubles(x[1].size()),
            Doubles(x[2].size()), Doubles(p.bias.data.size())};
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t h = 0; h < c.Hq; ++h) {
      for (int64_t i = 0; i < p.shape().sequence(b).Sq; ++i) reference_row(p, x, b, h, i, r);
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
  Stored<T> o(p.B, c.Hq, p.q_rows, c.Dv), dq(p.B, c.Hq, p.q_rows, c.D),
      dk(p.B, c.Hkv, p.k_rows, c.D), dv(p.B, c.Hkv, p.k_rows, c.Dv);
  std::vector<T> dbias(p.bias.data.size(), from_float<T>(NAN));
  std::vector<float> lse(size_t(p.B * c.Hq * p.q_rows), NAN);
  using In = const void*;
  const int64_t batch = p.B == 1 ? 0 : c.Hq * p.q_rows;
  const View<In> q = p.q.template view<In>(), k = p.k.template view<In>(),
                 v = p.v.template view<In>();

  Workspace forward(cpu::forward_workspace(s, parallel.threads));
  cpu::forward(
      {s, q, k, v, o.template view<void*>(), {lse.data(), batch, p.q_rows}, forward.data.data()},
      parallel);
  CHECK(!forward.overrun() && o.gaps_untouched());

  Workspace backward(cpu::backward_workspace(s, parallel.threads));
  cpu::backward({s,
                 p.dout.template view<In>(),
                 q,
                 k,
                 v,
                 o.template view<In>(),
                 {lse.data(), batch, p.q_rows},
                 {c.dlse ? p.dlse.data() : nullptr, batch, p.q_rows},
                 dq.template view<void*>(),
                 dk.template view<void*>(),
                 dv.template view<void*>(),
                 p.bias.template broadcast<void*>(dbias.data()),
                 backward.data.data()},
                parallel);
  CHECK(!backward.overrun() && dq.gaps_untouched() && dk.gaps_untouched() && dv.gaps_untouched());
  Results r{o.values(), Doubles(lse.begin(), lse.end()), dq.values(), dk.values(), dv.values(), {}};
  for (T x : dbias) r.dbias.push_back(double(to_float(x)));
  return r;
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
                           close(ours.dv, wanted.dv, tolerance, "dv") &&
                           close(ours.dbias, wanted.dbias, tolerance, "dbias");
        if (!right) {
          std::cerr << "case " << i << " on " << isa_name(isa()) << " with " << parallel.threads
                    << " threads\n";
        }
        CHECK(right);
      }
    }
  }
}

// ---- decoding -----------------------------------------------------------------------------------

// Each sequence by itself, by the forward pass, against all of them from a cache: contiguous, or in
// pages that lie in any order. Behind a sequence's end the cache holds NaN.
template <class T>
void check_decoding(int64_t Hq, int64_t Hkv, int64_t Sq, int64_t page_size, int64_t left) {
  const std::vector<int32_t> lengths = {700, 0, 1, 64, 333};
  const int64_t B = int64_t(lengths.size()), D = 40, Dv = 24, most = 704, pages = most / page_size;
  std::mt19937 random(7);
  std::vector<int32_t> table(size_t(B * pages));
  std::iota(table.begin(), table.end(), 0);
  if (page_size < most) std::shuffle(table.begin(), table.end(), random);
  Stored<T> k(B * pages, Hkv, page_size, D), v(B * pages, Hkv, page_size, Dv), q(B, Hq, Sq, D),
      o(B, Hq, Sq, Dv);
  q.fill(random);
  std::vector<float> lse(size_t(B * Hq * Sq), NAN), sinks(size_t(Hq), 0.5f);
  Case c{1, Hq, Hkv, Sq, 0, D, Dv, none, none, Corner::bottom_right, left, 0};
  c.capped = c.sloped = c.sunk = true;
  const Problem<T> whole(Case(c).with([&](Case& x) { x.B = B; }));

  Results wanted{};
  for (int64_t b = 0; b < B; ++b) {
    c.Sk = lengths[size_t(b)];
    Problem<T> p(c, unsigned(b + 1));
    std::copy_n(whole.slopes.begin() + b * Hq, Hq, p.slopes.begin());
    p.sinks = whole.sinks;
    for (int64_t h = 0; h < Hkv; ++h) {
      for (int64_t j = 0; j < c.Sk; ++j) {
        const int64_t page = table[size_t(b * pages + j / page_size)];
        std::copy_n(&p.k.data[p.k.at(0, h, j, 0)], D, &k.data[k.at(page, h, j % page_size, 0)]);
        std::copy_n(&p.v.data[p.v.at(0, h, j, 0)], Dv, &v.data[v.at(page, h, j % page_size, 0)]);
      }
    }
    for (int64_t h = 0; h < Hq; ++h) {
      for (int64_t i = 0; i < Sq; ++i) {
        std::copy_n(&p.q.data[p.q.at(0, h, i, 0)], D, &q.data[q.at(b, h, i, 0)]);
      }
    }
    const Results one = reference(p);
    wanted.o.insert(wanted.o.end(), one.o.begin(), one.o.end());
    wanted.lse.insert(wanted.lse.end(), one.lse.begin(), one.lse.end());
  }

  Shape s = whole.shape();
  s.Sk = most;
  for (const Parallel& parallel : {Parallel::serial(), std_threads<3>(), std_threads<16>()}) {
    Workspace workspace(cpu::decode_workspace(s, parallel.threads));
    const int32_t* pages_of = page_size < most ? table.data() : nullptr;
    cpu::decode({s,
                 q.template view<const void*>(),
                 k.template view<const void*>(),
                 v.template view<const void*>(),
                 lengths.data(),
                 {pages_of, pages, page_size},
                 o.template view<void*>(),
                 {lse.data(), Hq * Sq, Sq},
                 workspace.data.data()},
                parallel);
    CHECK(!workspace.overrun() && o.gaps_untouched());
    const double tolerance = std::is_same_v<T, float> ? 1e-5 : 2e-2;
    CHECK(close(o.values(), wanted.o, tolerance, "o"));
    CHECK(close(Doubles(lse.begin(), lse.end()), wanted.lse, 1e-5, "lse"));
  }
}

template <class T>
void check_decodings() {
  for (int level = 0; level <= int(detected_isa()); ++level) {
    CHECK(set_isa(Isa(level)));
    for (int64_t page_size : {704, 64, 16, 11}) {
      check_decoding<T>(2, 2, 1, page_size, kUnlimited);
      check_decoding<T>(4, 1, 1, page_size, 100);
      check_decoding<T>(8, 1, 2, page_size, kUnlimited);  // rows enough for a tile
      check_decoding<T>(2, 1, 40, page_size, 70);
    }
  }
}

}  // namespace

TEST(attention_f32_is_right) { check_all<float>(1e-5); }
TEST(attention_bf16_is_right) { check_all<bf16>(2e-2); }
TEST(attention_f16_is_right) { check_all<fp16>(3e-3); }
TEST(decoding_f32_is_right) { check_decodings<float>(); }
TEST(decoding_bf16_is_right) { check_decodings<bf16>(); }

TEST(attention_is_the_same_every_time) {
  set_isa(detected_isa());
  const Problem<float> p({1, 4, 1, 200, 300, 64, 64, none, keys});
  const Results first = kernels(p, std_threads<5>());
  for (int i = 0; i < 5; ++i) {
    const Results again = kernels(p, std_threads<5>());
    CHECK(first.o == again.o && first.dq == again.dq && first.dk == again.dk &&
          first.dv == again.dv && first.dbias == again.dbias);
  }
}

// More keys than one block and scores far apart: the sums must be rescaled, never overflow.
TEST(attention_of_large_scores_is_finite) {
  Case c{1, 1, 1, 70, 200, 16, 16};
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
