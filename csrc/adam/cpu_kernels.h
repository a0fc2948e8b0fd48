// The Adam update over a list of parameters, for one instruction set (see
// common/cpu/foreach_isa.h).
//
// The parameters' elements are thought of as one long row; each thread takes a slice of it,
// whatever the sizes of the parameters:
//
//   parameter   |    0    |  1 | 2|          3           | 4|5|   6    |
//   thread      |-------- 0 --------|-------- 1 --------|-------- 2 ---|
//
// The four or five arrays of a parameter are read and written once, W elements at a time, side by
// side:
//
//   p  g  m  v  (vmax)   ->  vectors  ->  p  m  v  (vmax, g)        28 bytes an element in fp32
//
// so the work is bound by memory alone. The hardware follows seven streams by itself: software
// prefetch made it slower, and every line that is stored has just been read, so streaming stores
// gain nothing.

namespace bigkern::adam::BIGKERN_ISA {
using namespace bigkern::BIGKERN_ISA;
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements below which a second thread does not pay
constexpr int64_t kSliceStep = 64;   // slices inside a parameter start on cache lines

// One step of one parameter, broadcast.
struct Scalars {
  Constants c;
  Factors f;
  float grad_scale;
  bool scaled;
};

// W elements of one parameter.
struct Vectors {
  vf p, g, m, v, vmax;
};

template <bool AMSGRAD>
inline __attribute__((always_inline)) void step(const Scalars& s, Vectors& x) {
  if (s.scaled) x.g = x.g / s.grad_scale;
  vf g = x.g * s.c.sign;
  x.p = x.p * s.f.decay;
  if (s.c.l2 != 0.0f) g = fma(x.p, set1(s.c.l2), g);
  x.m = fma(g - x.m, set1(s.c.one_minus_beta1), x.m);
  x.v = fma(g * g, set1(s.c.one_minus_beta2), x.v * s.c.beta2);
  if (AMSGRAD) x.vmax = max(x.vmax, x.v);
  const vf denominator = fma(sqrt(AMSGRAD ? x.vmax : x.v), set1(s.f.inv_sqrt_bias), set1(s.c.eps));
  x.p = x.p - x.m * s.f.step_size / denominator;
}

template <class T>
struct Arrays {
  T *p, *g, *m, *v, *vmax;
  explicit Arrays(const Parameter& x)
      : p(static_cast<T*>(x.p)),
        g(static_cast<T*>(x.g)),
        m(static_cast<T*>(x.m)),
        v(static_cast<T*>(x.v)),
        vmax(static_cast<T*>(x.vmax)) {}
};

// Elements begin to end of one parameter.
template <class T, bool AMSGRAD>
void update_range(const Arrays<T>& a, int64_t begin, int64_t end, const Scalars& s) {
  int64_t i = begin;
  for (; i + W <= end; i += W) {
    Vectors x = {load(a.p + i), load(a.g + i), load(a.m + i), load(a.v + i),
                 AMSGRAD ? load(a.vmax + i) : zero()};
    step<AMSGRAD>(s, x);
    store(a.p + i, x.p);
    store(a.m + i, x.m);
    store(a.v + i, x.v);
    if (AMSGRAD) store(a.vmax + i, x.vmax);
    if (s.scaled) store(a.g + i, x.g);
  }
  const int64_t n = end - i;
  if (n == 0) return;
  Vectors x = {load_n(a.p + i, n), load_n(a.g + i, n), load_n(a.m + i, n), load_n(a.v + i, n),
               AMSGRAD ? load_n(a.vmax + i, n) : zero()};
  step<AMSGRAD>(s, x);
  store_n(a.p + i, x.p, n);
  store_n(a.m + i, x.m, n);
  store_n(a.v + i, x.v, n);
  if (AMSGRAD) store_n(a.vmax + i, x.vmax, n);
  if (s.scaled) store_n(a.g + i, x.g, n);
}

// The parameter that holds element `position` of the long row.
inline int64_t parameter_at(const Parameter* parameters, int64_t count, int64_t position) {
  int64_t low = 0;
  while (count > 1) {
    const int64_t half = count / 2;
    if (parameters[low + half].before <= position) low += half;
    count -= half;
  }
  return low;
}

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Where a slice boundary falls inside a parameter: both neighbours round it the same way.
inline int64_t boundary(int64_t position, const Parameter& x) {
  if (position <= x.before) return 0;
  return min_of((position - x.before + kSliceStep - 1) / kSliceStep * kSliceStep, x.n);
}

template <class T>
void update_slice(const Scalars& call, const Update& u, const Parameter* parameters, int64_t count,
                  int64_t begin, int64_t end) {
  Scalars s = call;
  float last_t = 0.0f;
  for (int64_t i = parameter_at(parameters, count, begin); i < count; ++i) {
    const Parameter& x = parameters[i];
    if (x.before >= end) return;
    const float t = *x.step + 1.0f;
    if (t != last_t) s.f = factors_of(s.c, s.c.lr, t);
    last_t = t;
    const int64_t from = boundary(begin, x), to = boundary(end, x);
    if (u.amsgrad) {
      update_range<T, true>(Arrays<T>(x), from, to, s);
    } else {
      update_range<T, false>(Arrays<T>(x), from, to, s);
    }
  }
}

}  // namespace

template <class T>
void update(const Update& u, const Parameter* parameters, int64_t count, const Parallel& parallel) {
  if (count == 0) return;
  Scalars s = {constants_of(u), {}, 1.0f, u.grad_scale != nullptr};
  if (u.lr_tensor != nullptr) s.c.lr = *u.lr_tensor;
  if (s.scaled) s.grad_scale = *u.grad_scale;
  const int64_t elements = parameters[count - 1].before + parameters[count - 1].n;
  parallel.for_range(0, elements, kGrain, [&](int64_t begin, int64_t end) {
    update_slice<T>(s, u, parameters, count, begin, end);
  });
}

}  // namespace bigkern::adam::BIGKERN_ISA
