// The Adam update of a slice of all parameters. Compiled once per instruction set.
//
// Every array of a parameter is read and written once, W elements at a time, side by side:
//
//   p  g  m  v  (vmax)   ->  vectors  ->  p  m  v  (vmax, g)        28 bytes an element in fp32
//
// so the work is bound by memory alone, and whatever is stored in fewer bytes makes it faster.
// storage.inl knows how each is stored. The hardware follows seven streams by itself: software
// prefetch made it slower, and every line that is stored has just been read, so streaming stores
// gain nothing.

#include <type_traits>

#include "adam/cpu/dynamic8.inl"
#include "adam/cpu/slices.h"
#include "adam/cpu/storage.inl"

namespace bigkern::adam::BIGKERN_ISA {
using namespace bigkern::BIGKERN_ISA;
namespace {

// One step of one parameter, broadcast.
struct Scalars {
  Constants c;
  Factors f;
  float grad_scale, gain;  // gain: the sign, and what clipping leaves
  bool scaled, zeroed, amsgrad;
};

inline Scalars scalars_of(const Update& u) {
  Scalars s = {constants_of(u), {}, 1.0f, 0.0f, u.grad_scale != nullptr, u.zero_grads, u.amsgrad};
  if (u.lr_tensor != nullptr) s.c.lr = *u.lr_tensor;
  if (s.scaled) s.grad_scale = *u.grad_scale;
  s.gain = s.c.sign;
  if (u.grad_norm != nullptr) {
    s.gain *= clip_of(*u.grad_norm / s.grad_scale, float(u.max_norm));
  }
  return s;
}

inline __attribute__((always_inline)) void step(const Scalars& s, Vectors& x) {
  vf g = x.g * s.gain;
  x.p = x.p * s.f.decay;
  if (s.c.l2 != 0.0f) g = fma(x.p, set1(s.c.l2), g);
  x.m = fma(g - x.m, set1(s.c.one_minus_beta1), x.m);
  x.v = fma(g * g, set1(s.c.one_minus_beta2), x.v * s.c.beta2);
  vf v = x.v;
  if (s.amsgrad) v = x.vmax = max(x.vmax, x.v);
  const vf denominator = fma(sqrt(v), set1(s.f.inv_sqrt_bias), set1(s.c.eps));
  x.p = x.p - x.m * s.f.step_size / denominator;
}

// W elements from i on, or, if not WHOLE, n.
template <bool WHOLE, class T, class Place, class States>
inline __attribute__((always_inline)) void update_vector(const Scalars& s, T* g, Place& place,
                                                         States& states, int64_t i, int64_t n) {
  Vectors x = {};
  x.p = place.template load<WHOLE>(i, n);
  x.g = get<WHOLE>(g + i, n);
  states.template load<WHOLE>(x, i, n);
  if (s.scaled) x.g = x.g / s.grad_scale;
  if (s.scaled || s.zeroed) put<WHOLE>(g + i, s.zeroed ? zero() : x.g, n);
  step(s, x);
  place.template store<WHOLE>(x.p, i, n);
  states.template store<WHOLE>(x, i, n);
}

// Elements begin to end of one parameter.
template <class T, class Place, class States>
void update_range(const Scalars& s, T* g, Place& place, States& states, int64_t begin,
                  int64_t end) {
  while (begin < end) {
    const int64_t stop = end - begin > States::kRun ? begin + States::kRun : end;
    states.open(begin);
    int64_t i = begin;
    for (; i + W <= stop; i += W) update_vector<true>(s, g, place, states, i, W);
    if (i < stop) update_vector<false>(s, g, place, states, i, stop - i);
    states.close(begin, stop - begin);
    begin = stop;
  }
}

}  // namespace

// Elements begin to end of the long row, stored as STORAGE (update.cpp) says.
template <class STORAGE>
void update(const Update& u, const Parameter* parameters, int64_t count, int64_t begin,
            int64_t end) {
  using T = typename STORAGE::Param;
  using M = typename STORAGE::Moment;
  using Moments = std::conditional_t<std::is_same_v<M, uint8_t>, Codes, States<M>>;
  Scalars s = scalars_of(u);
  float last_t = 0.0f;
  for (int64_t i = parameter_at(parameters, count, begin); i < count; ++i) {
    const Parameter& x = parameters[i];
    if (x.before >= end) return;
    const float t = *x.step + 1.0f;
    if (t != last_t) s.f = factors_of(s.c, s.c.lr, t);
    last_t = t;
    Place<T, STORAGE::kMaster> place(u, x, t);
    Moments states(u, x, t);
    update_range(s, static_cast<T*>(x.g), place, states, cut(begin, x), cut(end, x));
  }
}

}  // namespace bigkern::adam::BIGKERN_ISA
