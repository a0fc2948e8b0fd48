// dynamic8.h's codes, W at a time, for one instruction set (see common/cpu/foreach_isa.h).
//
// The exponent of a level k, as a float, is its decade, and both directions are a line a decade:
//
//   value = slope[decade] k + start[decade]
//   k     = floor(slope[decade] share + start[decade]), at most the decade's last
//
// with the eight rows of each table in one register. Decades of shares do not begin at powers of
// two: a share's bits, read as a number, are nearly its logarithm, which gives the decade or the
// one below, and one comparison says which.

namespace bigkern::adam::BIGKERN_ISA {
using namespace bigkern::BIGKERN_ISA;
namespace {

// ---- tables -------------------------------------------------------------------------------------

constexpr double tenth_power(int n) {
  double x = 1.0;
  for (int i = 0; i < n; ++i) x /= 10.0;
  return x;
}

// Row: k's exponent modulo 8, with its bias. The row after the last decade's is for 1; unsigned it
// is also for k = 1, which is 0, and one line serves both.
struct Values {
  float slope[8], start[8];
};

template <bool SIGNED>
constexpr Values values_of() {
  Values t = {};
  for (int e = kFirst<SIGNED>; e <= kLast<SIGNED>; ++e) {
    const double tens = tenth_power(kLast<SIGNED> - e), steps = 1 << e;
    t.slope[(127 + e) % 8] = float(0.9 * tens / steps);
    t.start[(127 + e) % 8] = float(tens * (0.45 / steps - 0.8));
  }
  const int ends = (128 + kLast<SIGNED>) % 8;
  t.slope[ends] = SIGNED ? 0.0f : 1.0f / 255.0f;
  t.start[ends] = SIGNED ? 1.0f : -1.0f / 255.0f;
  return t;
}

// Row: the decade; signed there is one for 0 ahead, unsigned one for 1 behind.
struct Levels {
  float slope[8], start[8], most[8];
  float next[8];  // the share above which the next row holds
};

template <bool SIGNED, int E = kFirst<SIGNED>>
constexpr Levels levels_of(Levels t = {}) {
  if constexpr (E <= kLast<SIGNED>) {
    const int row = E + (SIGNED ? 1 : -1);
    const double tens = tenth_power(kLast<SIGNED> - E), steps = 1 << E;
    t.slope[row] = float(steps / (0.9 * tens));
    t.start[row] = float(steps * (1.0 - 0.1 / 0.9));
    t.most[row] = float(2.0 * steps - 1.0);
    t.next[row] = kAbove<SIGNED, E>;
    return levels_of<SIGNED, E + 1>(t);
  }
  if (SIGNED) t.next[0] = kSmallest<SIGNED>;
  if (!SIGNED) t.start[7] = t.most[7] = float(2 << kLast<SIGNED>);
  if (!SIGNED) t.next[6] = kLargest<SIGNED>;
  t.next[7] = 2.0f;  // of no share
  return t;
}

template <bool SIGNED>
constexpr Values kValues = values_of<SIGNED>();
template <bool SIGNED>
constexpr Levels kLevels = levels_of<SIGNED>();

// ---- W codes ------------------------------------------------------------------------------------

inline __attribute__((always_inline)) vf as_float(vi x) { return __builtin_convertvector(x, vf); }
inline __attribute__((always_inline)) vi as_int(vf x) { return __builtin_convertvector(x, vi); }

template <bool SIGNED>
inline __attribute__((always_inline)) vf value_of(vf k) {
  const vi row = vi(k) >> 23;
  return fma(k, lookup8(kValues<SIGNED>.slope, row), lookup8(kValues<SIGNED>.start, row));
}

template <bool SIGNED>
inline __attribute__((always_inline)) vf decode(vi code) {
  if constexpr (!SIGNED) return value_of<false>(as_float(code + 1));
  const vi level = code - 127, sign = level & int32_t(0x80000000u);
  const vf k = as_float(level < 0 ? -level : level);
  return vf(vi(select(k == 0.0f, k, value_of<true>(k))) | sign);
}

// The row of levels_of for a share in [0, 1].
template <bool SIGNED>
inline __attribute__((always_inline)) vi row_of(vf share) {
  constexpr float log10_2 = 0.30103f, units = log10_2 / (1 << 23);
  constexpr float first =
      SIGNED ? 7.35f : 6.45f;  // 1, and a few times where a row begins, is below
  const vf guess = fma(as_float(vi(share)), set1(units), set1(first - 127 * log10_2));
  const vi row = as_int(max(guess, zero()));
  return row - (share > lookup8(kLevels<SIGNED>.next, row));
}

template <bool SIGNED>
inline __attribute__((always_inline)) vi nearest(vf share) {
  const vi row = row_of<SIGNED>(share);
  const Levels& t = kLevels<SIGNED>;
  return as_int(
      min(fma(share, lookup8(t.slope, row), lookup8(t.start, row)), lookup8(t.most, row)));
}

// x of this share: a v above 0 keeps a code above 0.
template <bool SIGNED>
inline __attribute__((always_inline)) vi encode(vf x, vf share) {
  if constexpr (SIGNED) {
    const vi sign = vi(x) >> 31;
    vi k = nearest<true>(abs(share));
    k -= abs(share) > kLargest<true>;
    k += sign & (k > 127);
    return ((k ^ sign) - sign) + 127;
  } else {
    const vi k = nearest<false>(share);
    return k - 1 - ((x > 0.0f) & (k < 2));
  }
}

}  // namespace
}  // namespace bigkern::adam::BIGKERN_ISA
