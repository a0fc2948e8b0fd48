// int8 as a storage type beside those of vec.inl: whole numbers of [-128, 127] as vectors of
// floats.
//
// Every one of them is a float and a bf16 without rounding. Compiled once per instruction set.

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "common/cpu/vec.inl"
#endif

namespace bigkern::BIGKERN_ISA {
namespace {

inline __attribute__((always_inline)) vf load(const int8_t* p) {
#if BIGKERN_LEVEL >= 2
  const __m512i x = _mm512_maskz_cvtepi8_epi32(0xffff, load_raw<__m128i>(p));
  return vf(_mm512_maskz_cvtepi32_ps(0xffff, x));
#elif BIGKERN_LEVEL == 1
  return vf(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load_raw<int64_t>(p)))));
#else
  typedef int8_t bytes __attribute__((vector_size(W)));
  return __builtin_convertvector(load_raw<bytes>(p), vf);
#endif
}

inline vf load_n(const int8_t* p, int64_t n) {
  int8_t lane[W] = {};
  memcpy(lane, p, size_t(n));
  return load(lane);
}

inline void store(int8_t* p, vf x) {
  const vi whole = __builtin_convertvector(x, vi);
  for (int i = 0; i < W; ++i) p[i] = int8_t(whole[i]);
}

// W words for dot_bf16 of floats that are bf16 as they are: nothing is rounded.
inline __attribute__((always_inline)) vf pair_exact(vf even, vf odd) {
  return vf((vu(even) >> 16) | vu(odd));
}

}  // namespace
}  // namespace bigkern::BIGKERN_ISA
