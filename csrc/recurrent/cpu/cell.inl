// One step of a cell for W units of one sequence, in registers: from gates to state, and back.
//
// The gates come as x + b + W_hh h' (GRU's n in two parts), and stay activated for the backward.
// Compiled once per instruction set.

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "recurrent/cpu/plan.inl"
#endif

namespace bigkern::recurrent::BIGKERN_ISA {
namespace {

template <Mode mode>
constexpr int G = int(gates_of(mode));

// What a step keeps beside the gates: c of the LSTM, W_n h' + b_n of the GRU.
template <Mode mode>
constexpr bool reserves = G<mode> > 1;

// gates: the input's part on entry, activated on return. products: the state's part. Returns h;
// c' becomes c.
template <Mode mode>
inline __attribute__((always_inline)) vf cell(vf (&gates)[G<mode>], const vf (&products)[G<mode>],
                                              vf h_before, vf& reserve) {
  if constexpr (mode == Mode::lstm) {
    vf &i = gates[0], &f = gates[1], &g = gates[2], &o = gates[3];
    i = sigmoid(i + products[0]);
    f = sigmoid(f + products[1]);
    g = tanh(g + products[2]);
    o = sigmoid(o + products[3]);
    reserve = fma(f, reserve, i * g);
    return o * tanh(reserve);
  } else if constexpr (mode == Mode::gru) {
    vf &r = gates[0], &z = gates[1], &n = gates[2];
    r = sigmoid(r + products[0]);
    z = sigmoid(z + products[1]);
    reserve = products[2];
    n = tanh(fma(r, reserve, n));
    return fma(z, h_before - n, n);
  } else if constexpr (mode == Mode::rnn_tanh) {
    return gates[0] = tanh(gates[0] + products[0]);
  } else {
    return gates[0] = max(gates[0] + products[0], zero());
  }
}

// The gradients of a step. On entry dh is that of h and dc that of c; on return dh is what reaches
// h' past the weights, dc that of c', and `gates` become the gradients of the gates before their
// activation. of_hidden_n is that of GRU's W_n h' + b_n.
template <Mode mode>
inline __attribute__((always_inline)) void cell_backward(vf (&gates)[G<mode>], vf reserve,
                                                         vf before, vf& dh, vf& dc,
                                                         vf& of_hidden_n) {
  if constexpr (mode == Mode::lstm) {  // before: c'
    const vf i = gates[0], f = gates[1], g = gates[2], o = gates[3];
    const vf tanh_c = tanh(reserve);
    const vf of_c = fma(dh * o, fma(0.0f - tanh_c, tanh_c, set1(1.0f)), dc);
    gates[0] = of_c * g * i * (1.0f - i);
    gates[1] = of_c * before * f * (1.0f - f);
    gates[2] = of_c * i * fma(0.0f - g, g, set1(1.0f));
    gates[3] = dh * tanh_c * o * (1.0f - o);
    dc = of_c * f;
    dh = zero();
  } else if constexpr (mode == Mode::gru) {  // before: h'
    const vf r = gates[0], z = gates[1], n = gates[2];
    const vf dn = dh * (1.0f - z) * fma(0.0f - n, n, set1(1.0f));
    gates[0] = dn * reserve * r * (1.0f - r);
    gates[1] = dh * (before - n) * z * (1.0f - z);
    gates[2] = dn;
    of_hidden_n = dn * r;
    dh = dh * z;
  } else {
    const vf h = gates[0];
    if constexpr (mode == Mode::rnn_tanh) {
      gates[0] = dh * fma(0.0f - h, h, set1(1.0f));
    } else {
      gates[0] = select(h > 0.0f, dh, zero());
    }
    dh = zero();
  }
}

}  // namespace
}  // namespace bigkern::recurrent::BIGKERN_ISA
