// A recurrent layer in plain loops in double, sequence after sequence, and the data of its tests.
#pragma once

#include "layernorm_ffn_reference.h"  // Tensor
#include "recurrent/recurrent.h"

namespace bigkern::recurrent {

using layernorm_ffn::absent, layernorm_ffn::check_close, layernorm_ffn::Doubles;
using layernorm_ffn::kDtypes, layernorm_ffn::Tensor, layernorm_ffn::tolerance;

constexpr Mode kModes[] = {Mode::lstm, Mode::gru, Mode::rnn_tanh, Mode::rnn_relu};

struct Case {
  Mode mode;
  Dtype dtype;
  int64_t D, B, T, H, I;
  bool packed = false, zoneout = false, biases = true, saves = true, dy = true, dstate = true;
};

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Random numbers, what a layer makes of them, and, from that as it is stored, what its scan's
// backward makes of random gradients. Where a mode has no such tensor, it is empty.
struct Problem {
  Case c;
  int64_t N = 0, G;
  std::vector<int64_t> batch_sizes;
  Tensor x, w_ih[2], w_hh[2], b_ih[2], b_hh[2], h0, c0, zoneout;
  Doubles y, hn, cn, gates, reserve;
  Tensor dy, dhn, dcn, stored_y, stored_gates, stored_reserve;
  Doubles dgates, dhidden_n, dh0, dc0;

  explicit Problem(const Case& c) : c(c), G(gates_of(c.mode)) {
    for (int64_t t = 0; t < c.T; ++t) {  // B, B, fewer, as few, fewer, ..
      batch_sizes.push_back(c.packed ? std::max<int64_t>(1, c.B * (c.T - t + t % 2) / c.T) : c.B);
      N += batch_sizes.back();
    }
    std::mt19937 random(unsigned(c.B + 64 * c.T + 512 * c.H + 65536 * c.I));
    const auto make = [&](bool wanted, int64_t count, double deviation) {
      return wanted ? Tensor::normal(c.dtype, count, 0, float(deviation), random)
                    : absent(c.dtype, count, 0);
    };
    const int64_t state = c.D * c.B * c.H;
    x = make(true, N * c.I, 1);
    for (int64_t d = 0; d < c.D; ++d) {
      w_ih[d] = make(true, G * c.H * c.I, 1 / std::sqrt(double(c.I)));
      w_hh[d] = make(true, G * c.H * c.H, 1 / std::sqrt(double(c.H)));
      b_ih[d] = make(c.biases, G * c.H, 0.5);
      b_hh[d] = make(c.biases, G * c.H, 0.5);
    }
    h0 = make(true, state, 1);
    c0 = make(c.mode == Mode::lstm, state, 1);
    zoneout = make(c.zoneout, N * c.D * c.H, 0.3);
    dy = make(c.dy, N * c.D * c.H, 1);
    dhn = make(c.dstate, state, 1);
    dcn = make(c.dstate && c.mode == Mode::lstm, state, 1);
    forward();
    stored_y = stored(c.dtype, y);
    stored_gates = stored(c.dtype, gates);
    stored_reserve = stored(Dtype::f32, reserve);
    backward();
  }

  static Tensor stored(Dtype dtype, const Doubles& values) {
    Tensor t = Tensor::poisoned(dtype, int64_t(values.size()));
    for (size_t i = 0; i < values.size(); ++i) {
      t.store(i, float(values[i]));
      t.values.push_back(t.load(i));
    }
    return t;
  }

  // The rows of a sequence in the order of the walk.
  std::vector<int64_t> rows_of(int64_t d, int64_t b) const {
    std::vector<int64_t> rows;
    int64_t offset = 0;
    for (const int64_t present : batch_sizes) {
      if (b < present) rows.push_back(offset + b);
      offset += present;
    }
    if (d == 1) std::reverse(rows.begin(), rows.end());
    return rows;
  }

  // w v + b.
  Doubles affine(const Tensor& w, const double* v, int64_t K, const Tensor& b) const {
    Doubles out = b.values;
    for (size_t i = 0; i < out.size(); ++i) {
      for (int64_t k = 0; k < K; ++k) out[i] += w.values[i * size_t(K) + size_t(k)] * v[k];
    }
    return out;
  }

  void forward() {
    const size_t H = size_t(c.H), rows = size_t(N * c.D) * H, state = size_t(c.D * c.B) * H;
    y.resize(rows), hn.resize(state), gates.resize(rows * size_t(G));
    if (c.mode == Mode::lstm) cn.resize(state);
    if (G > 1) reserve.resize(rows);
    for (int64_t d = 0; d < c.D; ++d) {
      for (int64_t b = 0; b < c.B; ++b) {
        const size_t own = size_t(d * c.B + b) * H;
        Doubles h(&h0.values[own], &h0.values[own] + H), cell(&c0.values[own], &c0.values[own] + H);
        for (const int64_t n : rows_of(d, b)) step(d, n, h, cell);
        std::copy(h.begin(), h.end(), &hn[own]);
        if (c.mode == Mode::lstm) std::copy(cell.begin(), cell.end(), &cn[own]);
      }
    }
  }

  void step(int64_t d, int64_t n, Doubles& h, Doubles& cell) {
    const Doubles of_x = affine(w_ih[d], &x.values[size_t(n * c.I)], c.I, b_ih[d]);
    const Doubles of_h = affine(w_hh[d], h.data(), c.H, b_hh[d]);
    const size_t H = size_t(c.H), at = size_t(n * c.D + d) * H;
    for (size_t j = 0; j < H; ++j) {
      double* gate[4];
      for (size_t g = 0; g < size_t(G); ++g) gate[g] = &gates[at * size_t(G) + g * H + j];
      const auto sum = [&](size_t g) { return of_x[g * H + j] + of_h[g * H + j]; };
      double now;
      if (c.mode == Mode::lstm) {
        const double i = *gate[0] = sigmoid(sum(0)), f = *gate[1] = sigmoid(sum(1));
        const double g = *gate[2] = std::tanh(sum(2)), o = *gate[3] = sigmoid(sum(3));
        reserve[at + j] = cell[j] = f * cell[j] + i * g;
        now = o * std::tanh(cell[j]);
      } else if (c.mode == Mode::gru) {
        const double r = *gate[0] = sigmoid(sum(0)), z = *gate[1] = sigmoid(sum(1));
        reserve[at + j] = of_h[2 * H + j];
        const double candidate = *gate[2] = std::tanh(of_x[2 * H + j] + r * of_h[2 * H + j]);
        now = (1 - z) * candidate + z * h[j];
      } else {
        now = *gate[0] = c.mode == Mode::rnn_tanh ? std::tanh(sum(0)) : std::max(sum(0), 0.0);
      }
      y[at + j] = now + zoneout.values[at + j] * (h[j] - now);
    }
    std::copy(&y[at], &y[at] + H, h.begin());
  }

  void backward() {
    const size_t H = size_t(c.H);
    dgates.resize(gates.size()), dh0.resize(hn.size()), dc0.resize(cn.size());
    if (c.mode == Mode::gru) dhidden_n.resize(y.size());
    for (int64_t d = 0; d < c.D; ++d) {
      for (int64_t b = 0; b < c.B; ++b) {
        const size_t own = size_t(d * c.B + b) * H;
        Doubles dh(&dhn.values[own], &dhn.values[own] + H);
        Doubles dc(&dcn.values[own], &dcn.values[own] + H);
        const std::vector<int64_t> rows = rows_of(d, b);
        for (size_t i = rows.size(); i-- > 0;) {
          const size_t before = i == 0 ? own : size_t(rows[i - 1] * c.D + d) * H;
          step_backward(
              d, rows[i], dh, dc, &(i == 0 ? h0 : stored_y).values[before],
              c.mode != Mode::lstm ? nullptr : &(i == 0 ? c0 : stored_reserve).values[before]);
        }
        std::copy(dh.begin(), dh.end(), &dh0[own]);
        if (c.mode == Mode::lstm) std::copy(dc.begin(), dc.end(), &dc0[own]);
      }
    }
  }

  // dh, dc: those of the step's h, c on entry, of h', c' on return.
  void step_backward(int64_t d, int64_t n, Doubles& dh, Doubles& dc, const double* h_before,
                     const double* c_before) {
    const size_t H = size_t(c.H), at = size_t(n * c.D + d) * H;
    const double* gate = &stored_gates.values[at * size_t(G)];
    double* dgate = &dgates[at * size_t(G)];
    Doubles passed(H), dhidden(size_t(G) * H);  // by the weights; of W_hh h'
    for (size_t j = 0; j < H; ++j) {
      const double whole = dh[j] + dy.values[at + j], kept = whole * zoneout.values[at + j];
      const double dj = whole - kept, first = gate[j];
      passed[j] = kept;
      if (c.mode == Mode::lstm) {
        const double f = gate[H + j], g = gate[2 * H + j], o = gate[3 * H + j];
        const double squashed = std::tanh(stored_reserve.values[at + j]);
        const double dcell = dc[j] + dj * o * (1 - squashed * squashed);
        dgate[j] = dcell * g * first * (1 - first);
        dgate[H + j] = dcell * c_before[j] * f * (1 - f);
        dgate[2 * H + j] = dcell * first * (1 - g * g);
        dgate[3 * H + j] = dj * squashed * o * (1 - o);
        dc[j] = dcell * f;
      } else if (c.mode == Mode::gru) {
        const double z = gate[H + j], candidate = gate[2 * H + j];
        const double dn = dj * (1 - z) * (1 - candidate * candidate);
        dgate[j] = dn * stored_reserve.values[at + j] * first * (1 - first);
        dgate[H + j] = dj * (h_before[j] - candidate) * z * (1 - z);
        dgate[2 * H + j] = dn;
        dhidden_n[at + j] = dn * first;
        passed[j] += dj * z;
      } else {
        dgate[j] = dj * (c.mode == Mode::rnn_tanh ? 1 - first * first : first > 0);
      }
    }
    std::copy(dgate, dgate + dhidden.size(), dhidden.begin());
    if (c.mode == Mode::gru) std::copy(&dhidden_n[at], &dhidden_n[at] + H, &dhidden[2 * H]);
    for (size_t i = 0; i < dhidden.size(); ++i) {
      for (size_t k = 0; k < H; ++k) passed[k] += dhidden[i] * w_hh[d].values[i * H + k];
    }
    dh = passed;
  }
};

}  // namespace bigkern::recurrent
