// Vectors of W floats, and the math of kernels on them, written once for every instruction set.
//
// Compiled once per instruction set. `vf` is a GCC/clang vector: + - * / and comparisons are
// operators, here are only the rest. Storage is float, bf16 or fp16;
// arithmetic is always float:
//
//   vf x = load(p + i);  x = fma(x, scale, shift);  store(p + i, exp(x));
//   vf tail = load_n(p + i, n);  store_n(p + i, tail, n);      0 <= n <= W, missing lanes are 0
//
// Polynomials are minimax fits made for this file; the error of each function stands beside it,
// measured over all of its range (tests/cpp/test_gemm.cpp).

#include <cstdint>
#include <cstring>

#include "common/cpu/isa.h"
#include "common/dtypes.h"

#if BIGKERN_X86
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "common/cpu/one_isa.h"
#endif

namespace bigkern::BIGKERN_ISA {
namespace {

#define BIGKERN_VEC inline __attribute__((always_inline))

#if BIGKERN_LEVEL >= 2
constexpr int W = 16;
#elif BIGKERN_LEVEL == 1
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));  // also the result of a comparison: 0, -1
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));  // W bf16 or fp16, as stored

// ---- moving -------------------------------------------------------------------------------------

BIGKERN_VEC vf set1(float x) { return x - vf{}; }  // "0 + x" would cost an addition, and lose -0
BIGKERN_VEC vi set1_int(int32_t x) { return vi{} + x; }
BIGKERN_VEC vf zero() { return vf{}; }

template <class V>
BIGKERN_VEC V load_raw(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
BIGKERN_VEC void store_raw(void* p, V v) {
  memcpy(p, &v, sizeof v);
}

BIGKERN_VEC vi lanes() {
  vi v;
  for (int i = 0; i < W; ++i) v[i] = i;
  return v;
}

BIGKERN_VEC vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }

#if BIGKERN_LEVEL >= 2
#include "common/cpu/vec_avx512.inl"
#elif BIGKERN_LEVEL == 1
#include "common/cpu/vec_avx2.inl"
#else
#include "common/cpu/vec_portable.inl"
#endif

// bf16 is the upper half of a float.
BIGKERN_VEC vf widen_bf16(vh h) { return vf(widen_words(h) << 16); }

// To nearest, ties to even; a NaN stays one.
BIGKERN_VEC vh narrow_bf16(vf x) {
#if BIGKERN_LEVEL >= 3
  if (!any_subnormal(x)) return (vh)_mm512_cvtneps_pbh(__m512(x));  // takes a subnormal as 0
#endif
  const vu bits = vu(x);
  const vu rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const vu quiet_nan = bits | 0x400000u;
  return narrow_words((x == x ? rounded : quiet_nan) >> 16);
}

BIGKERN_VEC vf load(const float* p) { return load_raw<vf>(p); }
BIGKERN_VEC vf load(const bf16* p) { return widen_bf16(load_raw<vh>(p)); }
BIGKERN_VEC vf load(const fp16* p) { return widen_fp16(load_raw<vh>(p)); }
BIGKERN_VEC void store(float* p, vf x) { store_raw(p, x); }
BIGKERN_VEC void store(bf16* p, vf x) { store_raw(p, narrow_bf16(x)); }
BIGKERN_VEC void store(fp16* p, vf x) { store_raw(p, narrow_fp16(x)); }

// The first n elements; the other lanes are zero and their memory is not touched.
BIGKERN_VEC vf load_n(const float* p, int64_t n) { return load_floats_n(p, n); }
BIGKERN_VEC vf load_n(const bf16* p, int64_t n) { return widen_bf16(load_halves_n(p, n)); }
BIGKERN_VEC vf load_n(const fp16* p, int64_t n) { return widen_fp16(load_halves_n(p, n)); }
BIGKERN_VEC void store_n(float* p, vf x, int64_t n) { store_floats_n(p, x, n); }
BIGKERN_VEC void store_n(bf16* p, vf x, int64_t n) { store_halves_n(p, narrow_bf16(x), n); }
BIGKERN_VEC void store_n(fp16* p, vf x, int64_t n) { store_halves_n(p, narrow_fp16(x), n); }

// x rounded to the storage type T and back: what a later load would see.
BIGKERN_VEC vf round_to(vf x, const float*) { return x; }
BIGKERN_VEC vf round_to(vf x, const bf16*) { return widen_bf16(narrow_bf16(x)); }
BIGKERN_VEC vf round_to(vf x, const fp16*) { return widen_fp16(narrow_fp16(x)); }
template <class T>
BIGKERN_VEC vf round_to(vf x) {
  return round_to(x, static_cast<const T*>(nullptr));
}

// acc[i] + a[2i] * b[2i] + a[2i+1] * b[2i+1], where a and b hold 2W bf16 each: vdpbf16ps where the
// level has it, otherwise two fma on the widened halves.
BIGKERN_VEC vf dot_bf16(vf acc, vi a, vi b) {
#if BIGKERN_LEVEL >= 3
  return vf(_mm512_dpbf16_ps(__m512(acc), (__m512bh)(a), (__m512bh)(b)));
#else
  const vi high = set1_int(int32_t(0xffff0000u));
  acc = fma(vf(vu(a) << 16), vf(vu(b) << 16), acc);
  return fma(vf(a & high), vf(b & high), acc);
#endif
}
constexpr bool has_dot_bf16 = BIGKERN_LEVEL >= 3;

// Rounded for dot_bf16, which takes a subnormal as 0: so may the conversion.
BIGKERN_VEC vh operand_bf16(vf x) {
#if BIGKERN_LEVEL >= 3
  return (vh)_mm512_cvtneps_pbh(__m512(x));
#else
  return narrow_bf16(x);
#endif
}

// W words for dot_bf16, each one bf16 of an even k and its odd neighbour.
BIGKERN_VEC vf pair_across(vf even, vf odd) {
#if BIGKERN_LEVEL >= 3
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(__m512(odd), __m512(even));
  return vf(_mm512_permutexvar_epi16(order, halves));
#else
  return vf(__builtin_convertvector(narrow_bf16(even), vu) |
            (__builtin_convertvector(narrow_bf16(odd), vu) << 16));
#endif
}
BIGKERN_VEC vi load_pairs(const bf16* p) { return load_raw<vi>(p); }  // 2W bf16
BIGKERN_VEC vi set1_pair(const bf16* p) { return set1_int(load_raw<int32_t>(p)); }

// ---- elementary functions -----------------------------------------------------------------------

BIGKERN_VEC vf abs(vf x) { return vf(vi(x) & 0x7fffffff); }
BIGKERN_VEC vf copysign(vf magnitude, vf sign) {
  return vf((vi(magnitude) & 0x7fffffff) | (vi(sign) & int32_t(0x80000000u)));
}

// Adding 1.5 * 2^23 pushes the fraction out: round to nearest, and the integer in the low bits.
constexpr float round_magic = 12582912.0f;
constexpr int32_t round_magic_bits = 0x4b400000;

// x * 2^n for n in [-252, 254], in two steps so that a subnormal or infinite result comes out
// right.
BIGKERN_VEC vf scale_by_power(vf x, vi n) {
  const vi half = n >> 1;
  return x * vf((half + 127) << 23) * vf((n - half + 127) << 23);
}

// c[0] + c[1] x + ... + c[D] x^D by Horner's rule.
template <int N>
BIGKERN_VEC vf polynomial(vf x, const float (&c)[N]) {
  vf sum = set1(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) sum = fma(sum, x, set1(c[i]));
  return sum;
}

// e^x = 2^n e^r, |r| <= ln2 / 2. 1 ulp. Underflows to 0, overflows to infinity, keeps NaN.
BIGKERN_VEC vf exp(vf x) {
  constexpr float c[] = {4.999999341e-01f, 1.666652011e-01f, 4.166839426e-02f, 8.368780623e-03f,
                         1.381446476e-03f};
  x = max(set1(-104.0f), min(set1(89.0f), x));
  const vf shifted = fma(x, set1(1.44269504f), set1(round_magic));
  const vf n = shifted - round_magic;
  vf r = fma(n, set1(-0.693359375f), x);  // ln2 in two parts, the first exact in 10 bits
  r = fma(n, set1(2.12194440e-4f), r);
  const vf e = fma(r * r, polynomial(r, c), r) + 1.0f;
  return scale_by_power(e, vi(shifted) - round_magic_bits);
}

// 2^x. 1 ulp.
BIGKERN_VEC vf exp2(vf x) {
  constexpr float c[] = {6.931472029e-01f, 2.402264791e-01f, 5.550332470e-02f,
                         9.618437366e-03f, 1.339887487e-03f, 1.535336061e-04f};
  x = max(set1(-151.0f), min(set1(129.0f), x));
  const vf shifted = x + round_magic;
  const vf r = x - (shifted - round_magic);
  return scale_by_power(fma(r, polynomial(r, c), set1(1.0f)), vi(shifted) - round_magic_bits);
}

// ln(x) = e ln2 + ln(1 + f), sqrt(1/2) <= 1 + f < sqrt(2). 1 ulp; ln(0) = -inf, ln(-1) = NaN.
BIGKERN_VEC vf log(vf x) {
  constexpr float c[] = {3.333331260e-01f,  -2.500000960e-01f, 2.000211873e-01f,
                         -1.666799567e-01f, 1.421955091e-01f,  -1.240559143e-01f,
                         1.188817462e-01f,  -1.167564126e-01f, 6.746601236e-02f};
  constexpr int32_t sqrt_half_bits = 0x3f3504f3;
  const float infinity = __builtin_inff();
  const vi subnormal = x < 1.17549435e-38f;
  const vf normal = select(subnormal, x * 8388608.0f, x);
  const vi offset = vi(normal) - sqrt_half_bits;
  const vf e = __builtin_convertvector((offset >> 23) - (subnormal & 23), vf);
  const vf f = vf((offset & 0x7fffff) + sqrt_half_bits) - 1.0f;
  const vf f2 = f * f;
  vf tail = fma(f2 * f, polynomial(f, c), e * -2.12194440e-4f);
  tail = fma(f2, set1(-0.5f), tail);
  const vf result = fma(e, set1(0.693359375f), f + tail);
  const vf special = select(x == 0.0f, set1(-infinity), x + infinity);  // NaN and inf stay
  const vi ordinary = (x > 0.0f) & (x < infinity);
  return select(ordinary, result, select(x < 0.0f, set1(__builtin_nanf("")), special));
}

// 2 ulp: an odd polynomial near 0, 1 - 2 / (e^2x + 1) beyond.
BIGKERN_VEC vf tanh(vf x) {
  constexpr float c[] = {-3.333325985e-01f, 1.333083037e-01f, -5.368802485e-02f, 2.046942444e-02f,
                         -5.515168050e-03f};
  const vf x2 = x * x;
  const vf near = fma(x * x2, polynomial(x2, c), x);
  const vf far = 1.0f - 2.0f / (exp(2.0f * abs(x)) + 1.0f);
  return select(abs(x) < 0.65f, near, copysign(far, x));
}

// (1 + erf(x / sqrt 2)) / 2 = 1/2 + x P(x^2), and 0 or 1 beyond 5.4. Absolute error 1.2e-7.
BIGKERN_VEC vf normal_cdf(vf x) {
  constexpr float c[] = {1.309281141e-01f, -6.532805413e-02f, 4.849959165e-02f, -3.920681402e-02f,
                         3.211659566e-02f, -2.574645542e-02f, 1.964513958e-02f, -1.396332309e-02f,
                         9.651212022e-03f, -6.715332158e-03f, 3.658897011e-03f, -1.186415670e-03f,
                         8.749534609e-04f, -1.028367085e-03f, 3.928527876e-04f};
  constexpr float edge = 5.4f;
  const vf a = max(set1(-edge), min(set1(edge), x));
  const vf u = fma(a * a, set1(2.0f / (edge * edge)), set1(-1.0f));  // P in u, of [-1, 1]
  return select(x < -edge, zero(), fma(a, polynomial(u, c), set1(0.5f)));
}

// 1 / (1 + e^-x)
BIGKERN_VEC vf sigmoid(vf x) { return 1.0f / (1.0f + exp(0.0f - x)); }

}  // namespace
}  // namespace bigkern::BIGKERN_ISA

#undef BIGKERN_VEC
