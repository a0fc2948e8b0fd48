// fp32 in two halves: bf16, rounded to nearest, and the 16 bits that rounding took away, signed.
//
//   p    = bits + 2^15 >> 16            what the model sees
//   rest = bits - (p << 16)             -2^15 .. 2^15 - 1
//
// Together they give back every bit: a master copy in 2 bytes in the place of 4. Ties go up.
#pragma once

#include "common/dtypes.h"

namespace bigkern::adam {

struct Halves {
  bf16 p;
  int16_t rest;
};

BIGKERN_HD Halves split(float x) {
  const uint32_t bits = detail::float_bits(x);
  const uint32_t upper = (bits + 0x8000u) >> 16;
  return {bf16{uint16_t(upper)}, int16_t(uint16_t(bits - (upper << 16)))};
}

BIGKERN_HD float join(Halves x) {
  return detail::bits_float((uint32_t(x.p.bits) << 16) + uint32_t(int32_t(x.rest)));
}

}  // namespace bigkern::adam
