// dynamic8.h's codes, W at a time. Compiled once per instruction set.
//
// The exponent of a level, as a float, is its decade, and both directions are a line a decade:
//
//   value = slope[decade] x + start[decade]       x = 2 k + 1 signed, k unsigned
//   k     = floor(slope[decade] share + start[decade]), at most the decade's last
//
// with the eight rows of each table in one register. Decades of shares do not begin at powers of
// two: a share's bits, read as a number, are nearly its logarithm, which gives the decade or the
// one below, and one comparison says which.

#include "adam/dynamic8.h"

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "common/cpu/vec.inl"
#endif

namespace bigkern::adam::BIGKERN_ISA {
using namespace bigkern::BIGKERN_ISA;
namespace {

// ---- tables -------------------------------------------------------------------------------------

constexpr double tenth_power(int n) {
  double x = 1.0;
  for (int i = 0; i < n; ++i) x /= 10.0;
  return x;
}

// Row: x's exponent, as a float keeps it, modulo 8. The row that no decade has is that of the
// smallest x, whose value is 0, and of the largest, whose value is 1: one line serves both.
struct Values {
  float slope[8], start[8];
};

template <bool SIGNED>
constexpr Values values_of() {
  Values t = {};
  for (int e = kFirst<SIGNED>; e <= kLast<SIGNED>; ++e) {
    const int row = (127 + e + (SIGNED ? 1 : 0)) % 8;
    const double tens = tenth_power(kLast<SIGNED> - e), steps = 1 << e;
    t.slope[row] = float((SIGNED ? 0.45 : 0.9) * tens / steps);
    t.start[row] = float(tens * ((SIGNED ? 0.0 : 0.45) / steps - 0.8));
  }
  t.slope[7] = SIGNED ? 1.0f / 256.0f : 1.0f / 255.0f;
  t.start[7] = -t.slope[7];
  return t;
}

// Row: the decade, from the lowest; row 7 is for 1.
struct Levels {
  float slope[8], start[8], most[8];
  float next[8];  // the share above which the next row holds
};

template <bool SIGNED, int E = kFirst<SIGNED>>
constexpr Levels levels_of(Levels t = {}) {
  constexpr int row = E - kFirst<SIGNED>;
  if constexpr (E > kLast<SIGNED>) {
    t.start[row] = t.most[row] = float(1 << E);
    t.next[row] = 2.0f;  // no share is
    return t;
  } else {
    const double tens = tenth_power(kLast<SIGNED> - E), steps = 1 << E;
    t.slope[row] = float(steps / (0.9 * tens));
    t.start[row] = float(steps * (1.0 - 0.1 / 0.9));
    t.most[row] = float(2.0 * steps - 1.0);
    if constexpr (E == kLast<SIGNED>) {
      t.next[row] = kLargest<SIGNED>;
    } else {
      t.next[row] = kAbove<SIGNED, E>;
    }
    if (E == 0) t.slope[row] = 1.0f / kSmallest<SIGNED>;  // one value, 1; what is nearer to 0 is 0
    if (E == 0) t.start[row] = 0.0f;
    return levels_of<SIGNED, E + 1>(t);
  }
}

template <bool SIGNED>
constexpr Values kValues = values_of<SIGNED>();
template <bool SIGNED>
constexpr Levels kLevels = levels_of<SIGNED>();

// ---- W codes ------------------------------------------------------------------------------------

inline __attribute__((always_inline)) vf as_float(vi x) { return __builtin_convertvector(x, vf); }
inline __attribute__((always_inline)) vi as_int(vf x) { return __builtin_convertvector(x, vi); }
inline __attribute__((always_inline)) vi at_least(vi x, vi low) { return x > low ? x : low; }
inline __attribute__((always_inline)) vf with_sign_of(vf magnitude, vf x) {
  return vf(vi(magnitude) | (vi(x) & int32_t(0x80000000u)));
}

template <bool SIGNED>
inline __attribute__((always_inline)) vf value_of(vf x) {
  const vi row = vi(x) >> 23;
  return fma(x, lookup8(kValues<SIGNED>.slope, row), lookup8(kValues<SIGNED>.start, row));
}

template <bool SIGNED>
inline __attribute__((always_inline)) vf decode(vi code) {
  const vf number = as_float(code);
  if constexpr (!SIGNED) return value_of<false>(number + 1.0f);
  const vf level = fma(number, set1(2.0f), set1(-254.0f));  // twice
  return with_sign_of(value_of<true>(abs(level) + 1.0f), level);
}

// The row of kLevels for a share in [0, 1].
template <bool SIGNED>
inline __attribute__((always_inline)) vi row_of(vf share) {
  constexpr float log10_2 = 0.30103f, units = log10_2 / (1 << 23);
  constexpr float first = 6.45f;  // in the decade that ends at 1, from 0.35 on it is right
  const vf guess = fma(as_float(vi(share)), set1(units), set1(first - 127 * log10_2));
  const vi row = at_least(as_int(guess), vi{});
  return count_above(row, share, lookup8(kLevels<SIGNED>.next, row));
}

// As a float, not yet rounded down to k.
template <bool SIGNED>
inline __attribute__((always_inline)) vf nearest(vf share) {
  const vi row = row_of<SIGNED>(share);
  const Levels& t = kLevels<SIGNED>;
  return min(fma(share, lookup8(t.slope, row), lookup8(t.start, row)), lookup8(t.most, row));
}

template <bool SIGNED>
inline __attribute__((always_inline)) vi encode(vf share) {
  if constexpr (SIGNED) {
    const vi level = as_int(with_sign_of(nearest<true>(abs(share)), share));
    return at_least(level, set1_int(-127)) + 127;
  } else {
    const vi lowest = count_above(vi{}, share, zero());  // a v above 0 keeps a code above 0
    return at_least(as_int(nearest<false>(share)) - 1, lowest);
  }
}

}  // namespace
}  // namespace bigkern::adam::BIGKERN_ISA
