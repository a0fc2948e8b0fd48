// The activations and their derivatives on vectors of floats.
//
// Compiled once per instruction set.

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "layernorm_ffn/cpu/norm.inl"
#endif

namespace bigkern::layernorm_ffn::BIGKERN_ISA {
namespace {

// Value and derivative at x.
struct Curve {
  vf value, slope;
};

// x Phi(x), Phi the normal distribution. Its slope is Phi(x) + x phi(x).
inline Curve gelu_curve(vf x) {
  const vf cdf = normal_cdf(x);
  const vf pdf = exp(x * x * -0.5f) * 0.398942280f;
  return {x * cdf, fma(x, pdf, cdf)};
}

// x (1 + tanh u) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3)
inline vf gelu_tanh_value(vf x) {
  const vf u = x * fma(x * x, set1(0.0356774081f), set1(0.797884561f));
  return 0.5f * x * (1.0f + tanh(u));
}
inline Curve gelu_tanh_curve(vf x) {
  const vf x2 = x * x;
  const vf t = tanh(x * fma(x2, set1(0.0356774081f), set1(0.797884561f)));
  const vf du = fma(x2, set1(3.0f * 0.0356774081f), set1(0.797884561f));
  const vf half = 0.5f * (1.0f + t);
  return {x * half, half + 0.5f * x * (1.0f - t * t) * du};
}

// x sigma(x). Its slope is sigma(x) (1 + x (1 - sigma(x))).
inline Curve silu_curve(vf x) {
  const vf s = sigmoid(x);
  return {x * s, s * (1.0f + x * (1.0f - s))};
}

// The curve that A bends its input (or its gate) by.
template <Activation A>
inline vf value_of(vf x) {
  if constexpr (A == Activation::relu) return max(zero(), x);  // a NaN stays one
  if constexpr (A == Activation::gelu || A == Activation::geglu) return x * normal_cdf(x);
  if constexpr (A == Activation::gelu_tanh) return gelu_tanh_value(x);
  if constexpr (A == Activation::silu || A == Activation::swiglu) return x * sigmoid(x);
}

template <Activation A>
inline Curve curve_of(vf x) {
  if constexpr (A == Activation::relu) {
    return {max(zero(), x), select(x <= 0.0f, zero(), set1(1.0f))};
  }
  if constexpr (A == Activation::gelu || A == Activation::geglu) return gelu_curve(x);
  if constexpr (A == Activation::gelu_tanh) return gelu_tanh_curve(x);
  if constexpr (A == Activation::silu || A == Activation::swiglu) return silu_curve(x);
}

// Calls f with the activation as a compile-time constant: f(Constant<Activation::relu>{}).
template <Activation A>
struct Constant {
  static constexpr Activation value = A;
};

template <class F>
inline void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::relu:
      return f(Constant<Activation::relu>{});
    case Activation::gelu:
      return f(Constant<Activation::gelu>{});
    case Activation::gelu_tanh:
      return f(Constant<Activation::gelu_tanh>{});
    case Activation::silu:
      return f(Constant<Activation::silu>{});
    case Activation::swiglu:
      return f(Constant<Activation::swiglu>{});
    case Activation::geglu:
      return f(Constant<Activation::geglu>{});
  }
}

// The gradient of W preactivations, and of as many of the other half if they are gates.
struct HiddenGradient {
  vf gate, up;
};

// The backward of a = drop(act(h)): dh is stored, and a again.
template <class T>
struct ActivationBackward {
  int64_t F;
  const T* h;  // [M, F] or [M, 2F]
  T *dh, *a;   // like h, and [M, F]; a null: not wanted
  Drop drop;

  // Row i, columns f .. f + n; da as it arrives, before the dropout is undone.
  template <Activation A, class N>
  HiddenGradient run(vf da, int64_t i, int64_t f, N n) const {
    constexpr bool gated = is_gated(A);
    const int64_t at = i * (gated ? 2 * F : F) + f;
    da = drop(da, i, f);
    Curve curve = curve_of<A>(load_upto(h + at, n));
    HiddenGradient d = {da * curve.slope, zero()};
    if constexpr (gated) {
      const vf up = load_upto(h + at + F, n);
      d.up = da * curve.value;
      store_upto(dh + at + F, d.up, n);
      curve.value *= up;
      d.gate *= up;
    }
    store_upto(dh + at, d.gate, n);
    if (a) store_upto(a + i * F + f, drop(curve.value, i, f), n);
    return d;
  }
};

}  // namespace
}  // namespace bigkern::layernorm_ffn::BIGKERN_ISA
