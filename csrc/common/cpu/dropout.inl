// The generator of common/dropout.h on vectors: a lane for each element.
//
// Compiled once per instruction set.

#include "common/dropout.h"

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "common/cpu/vec.inl"
#endif

namespace bigkern::BIGKERN_ISA {
namespace {

// mix but for its last step, x ^ x >> 16, which leaves the high half as it is.
inline __attribute__((always_inline)) vu mix_high(vu x, vu half_way) {
  x = (x ^ (x >> 16)) * kMix1 + half_way;
  return (x ^ (x >> 15)) * kMix2;
}

// The bits of the columns j in rows whose keys are (a, c).
inline __attribute__((always_inline)) vu draw_bits(vu a, vu c, vu j) {
  const vu x = mix_high(a + j * kGolden, c);
  return x ^ (x >> 16);
}

}  // namespace
}  // namespace bigkern::BIGKERN_ISA
