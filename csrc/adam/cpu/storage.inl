// How a parameter and its moments are stored between steps: W elements of each, as fp32 in
// registers, in and out. Compiled once per instruction set.
//
//   Place      p: T itself, or a master beside it          bytes of p and master, read + written
//                Master::none       T                        fp32 8, 16 bits 4
//                Master::f32        T is only written        10
//                Master::remainder  bf16 and 16 bits more    8
//   States     m, v, vmax: float, bf16, fp16, each as a vector of its own
//   Coded      m, v: 8-bit codes, a block of 256 at a time. A block's new scale is known only when
//              all of it is, so the new moments wait in a buffer of 2 KB, in the first cache.
//
//   block of m   codes, scale -> decode -> step -> buffer, largest -> encode -> codes, scale
//
// p, v and vmax can be rounded to bf16 at random.

#include <type_traits>

#include "adam/adam.h"
#include "adam/remainder.h"

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "adam/cpu/dynamic8.inl"
#endif

#include "common/cpu/dropout.inl"

namespace bigkern::adam::BIGKERN_ISA {
using namespace bigkern::BIGKERN_ISA;
namespace {

// W elements of one parameter.
struct Vectors {
  vf p, g, m, v, vmax;
};

// ---- whole vectors and tails --------------------------------------------------------------------

template <bool WHOLE, class T>
inline __attribute__((always_inline)) vf get(const T* from, int64_t n) {
  return WHOLE ? load(from) : load_n(from, n);
}

template <bool WHOLE, class T>
inline __attribute__((always_inline)) void put(T* to, vf x, int64_t n) {
  WHOLE ? store(to, x) : store_n(to, x, n);
}

template <bool WHOLE>
inline __attribute__((always_inline)) vu get_halves(const void* from, int64_t n) {
  return widen_words(WHOLE ? load_raw<vh>(from) : load_halves_n(from, n));
}

template <bool WHOLE>
inline __attribute__((always_inline)) void put_halves(void* to, vu x, int64_t n) {
  const vh halves = narrow_words(x);
  WHOLE ? store_raw(to, halves) : store_halves_n(to, halves, n);
}

// ---- rounding at random -------------------------------------------------------------------------

// The 16 bits that adam.h's random_row has for each of W neighbours of one parameter. Positions
// change their row every 2^32, maybe between two neighbours.
struct Draws {
  bool wanted;
  uint64_t seed;
  uint32_t head, t;
  int64_t before;
  int64_t until;  // the first position for which first and c do not hold
  vu first, c;    // first: a row's a, and how much further its W - 1 next columns are

  Draws(const Update& u, const Parameter& x, uint32_t head_, float t_)
      : wanted(u.stochastic),
        seed(u.seed),
        head(head_),
        t(uint32_t(t_)),
        before(x.before),
        until(0),
        first(),
        c() {}

  inline __attribute__((always_inline)) vu at(int64_t i) {
    const int64_t position = before + i;
    if (position >= until) turn_to(position);
    return mix_high(first + uint32_t(position) * kGolden, c) >> 16;
  }

  void turn_to(int64_t position) {
    for (int lane = 0; lane < W; ++lane) {
      const DropoutRow row = random_row(seed, head, t, position + lane);
      first[lane] = row.a + uint32_t(lane) * kGolden, c[lane] = row.c;
    }
    const int64_t next = ((position >> 32) + 1) << 32;
    until = position + W <= next ? next - W + 1 : position + 1;
  }
};

// Up with the probability of x's place between its two neighbours. An infinity stays, its low half
// being 0; so does a NaN, which arithmetic has made quiet: in the upper half.
template <bool WHOLE>
inline __attribute__((always_inline)) void put_random(bf16* to, vf x, vu bits, int64_t n) {
  put_halves<WHOLE>(to, (vu(x) + (x == x ? bits : vu{})) >> 16, n);
}

// ---- p ------------------------------------------------------------------------------------------

template <class T, Master MASTER>
struct Place {
  T* p;
  void* master;
  Draws draws;

  Place(const Update& u, const Parameter& x, float t)
      : p(static_cast<T*>(x.p)), master(x.master), draws(u, x, kParameter, t) {}

  template <bool WHOLE>
  inline __attribute__((always_inline)) vf load(int64_t i, int64_t n) const {
    if constexpr (MASTER == Master::none) {
      return get<WHOLE>(p + i, n);
    } else if constexpr (MASTER == Master::f32) {
      return get<WHOLE>(static_cast<float*>(master) + i, n);
    } else {
      const vu rest = get_halves<WHOLE>(static_cast<int16_t*>(master) + i, n);
      return vf((get_halves<WHOLE>(p + i, n) << 16) + vu(vi(rest << 16) >> 16));
    }
  }

  template <bool WHOLE>
  inline __attribute__((always_inline)) void store(vf x, int64_t i, int64_t n) {
    if constexpr (MASTER == Master::remainder) {
      put_halves<WHOLE>(p + i, (vu(x) + 0x8000u) >> 16, n);
      put_halves<WHOLE>(static_cast<int16_t*>(master) + i, vu(x), n);  // the low half of x
      return;
    }
    if constexpr (MASTER == Master::f32) put<WHOLE>(static_cast<float*>(master) + i, x, n);
    if constexpr (MASTER == Master::none && std::is_same_v<T, bf16>) {
      if (draws.wanted) return put_random<WHOLE>(p + i, x, draws.at(i), n);
    }
    put<WHOLE>(p + i, x, n);
  }
};

// ---- m and v ------------------------------------------------------------------------------------

template <class M>
struct States {
  M *m, *v, *vmax;
  Draws draws;
  static constexpr int64_t kRun = INT64_MAX;  // elements between open and close

  States(const Update& u, const Parameter& x, float t)
      : m(static_cast<M*>(x.m)),
        v(static_cast<M*>(x.v)),
        vmax(static_cast<M*>(x.vmax)),
        draws(u, x, kSquares, t) {}

  void open(int64_t) {}
  void close(int64_t, int64_t) {}

  template <bool WHOLE>
  inline __attribute__((always_inline)) void load(Vectors& x, int64_t i, int64_t n) const {
    x.m = get<WHOLE>(m + i, n);
    x.v = get<WHOLE>(v + i, n);
    if (vmax != nullptr) x.vmax = get<WHOLE>(vmax + i, n);
  }

  template <bool WHOLE>
  inline __attribute__((always_inline)) void store(const Vectors& x, int64_t i, int64_t n) {
    put<WHOLE>(m + i, x.m, n);
    if constexpr (std::is_same_v<M, bf16>) {
      if (draws.wanted) {
        const vu bits = draws.at(i);
        put_random<WHOLE>(v + i, x.v, bits, n);
        if (vmax != nullptr) put_random<WHOLE>(vmax + i, x.vmax, bits, n);
        return;
      }
    }
    put<WHOLE>(v + i, x.v, n);
    if (vmax != nullptr) put<WHOLE>(vmax + i, x.vmax, n);
  }
};

// The largest magnitude. Bits are compared, as integers: there a NaN is above all numbers.
inline float largest(const float* x, int64_t n) {
  vi most = {};
  for (int64_t i = 0; i < n; i += W) most = at_least(vi(abs(load_raw<vf>(x + i))), most);
  int32_t bits = 0;
  for (int lane = 0; lane < W; ++lane) bits = most[lane] > bits ? most[lane] : bits;
  return detail::bits_float(uint32_t(bits));
}

// One kind of moment, a block at a time.
template <bool SIGNED>
struct CodedMoment {
  uint8_t* codes;
  float* scales;
  float scale;
  alignas(64) float fresh[kBlock];

  CodedMoment(void* codes_, float* scales_)
      : codes(static_cast<uint8_t*>(codes_)), scales(scales_), scale(0.0f) {}

  void open(int64_t begin) { scale = scales[begin / kBlock]; }

  template <bool WHOLE>
  inline __attribute__((always_inline)) vf load(int64_t i, int64_t n) const {
    if constexpr (WHOLE) return decode<SIGNED>(load_bytes(codes + i)) * scale;
    const vf x = decode<SIGNED>(load_bytes_n(codes + i, n)) * scale;
    return select(lanes() < set1_int(int32_t(n)), x, zero());
  }

  inline __attribute__((always_inline)) void store(vf x, int64_t i) {
    store_raw(fresh + (i & (kBlock - 1)), x);
  }

  // Its n elements from begin on are stored: encode them.
  void close(int64_t begin, int64_t n) {
    scale = largest(fresh, n);
    scales[begin / kBlock] = scale;
    const float inverse = inverse_of_scale(n);
    for (int64_t i = 0; i < n; i += W) {
      const vi code = encode<SIGNED>(load_raw<vf>(fresh + i) * inverse);
      if (n - i >= W) {
        store_bytes(codes + begin + i, code);
      } else {
        store_bytes_n(codes + begin + i, code, n - i);
      }
    }
  }

  // 0 for 0. Numbers so small that it would be infinite are enlarged first.
  float inverse_of_scale(int64_t n) {
    if (scale >= 0x1p-100f) return 1.0f / scale;
    for (int64_t i = 0; i < n; i += W) store_raw(fresh + i, load_raw<vf>(fresh + i) * 0x1p100f);
    return scale > 0.0f ? 1.0f / (scale * 0x1p100f) : 0.0f;
  }
};

// Both, in the place of States.
struct Codes {
  CodedMoment<true> m;
  CodedMoment<false> v;
  static constexpr int64_t kRun = kBlock;

  Codes(const Update&, const Parameter& x, float) : m(x.m, x.m_scale), v(x.v, x.v_scale) {}

  void open(int64_t begin) {
    m.open(begin);
    v.open(begin);
  }
  void close(int64_t begin, int64_t n) {
    m.close(begin, n);
    v.close(begin, n);
  }

  template <bool WHOLE>
  inline __attribute__((always_inline)) void load(Vectors& x, int64_t i, int64_t n) const {
    x.m = m.load<WHOLE>(i, n);
    x.v = v.load<WHOLE>(i, n);
  }
  template <bool WHOLE>
  inline __attribute__((always_inline)) void store(const Vectors& x, int64_t i, int64_t) {
    m.store(x.m, i);
    v.store(x.v, i);
  }
};

}  // namespace
}  // namespace bigkern::adam::BIGKERN_ISA
