// Eight bits a number: block-wise dynamic quantisation, one number at a time.
//
// A block of 256 neighbours keeps its largest magnitude, and each number its share of that as one
// of 256 values, in seven decades, each twice as finely divided as the one below:
//
//   value(k) = 10^(d - 6) (0.1 + 0.9 (k / 2^d - 1 + 2^-d / 2))     d = floor(log2 k), k = 1 .. 127
//
//   signed (m)     code 127 + level: level 0 is 0, +-k is +-value(k), 128 is 1
//   unsigned (v)   level 0 is 0, level k - 1 is value(k) with 10^(d - 7), k = 2 .. 255, level 255
//   is 1
//
// so a code's level, as a float, has its decade in the exponent and its place there in the
// mantissa. A number takes the nearest value. A v that is not 0 never takes 0: p's step divides by
// its root.
//
// Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022.
#pragma once

#include "common/dtypes.h"

namespace bigkern::adam {

constexpr int kBlock = 256;

// How the two kinds number their decades: k of the lowest is in [2^FIRST, 2^(FIRST + 1)).
template <bool SIGNED>
constexpr int kFirst = SIGNED ? 0 : 1;
template <bool SIGNED>
constexpr int kLast = kFirst<SIGNED> + 6;

constexpr float kTens[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};

// Half-way between the last value of decade E and the first of the next: of 10^E times
// 1 - 0.45 / 2^E and 1 + 2.25 / 2^E.
template <bool SIGNED, int E>
constexpr float kAbove = kTens[E - kFirst<SIGNED>] * (1.0f + 0.9f / float(1 << E));
template <bool SIGNED>  // half of the smallest value
constexpr float kSmallest = 0.5e-6f * (0.1f + 0.45f / float(1 << kFirst<SIGNED>));
template <bool SIGNED>  // half-way between the largest value of the last decade and 1
constexpr float kLargest = 1.0f - 0.225f / float(1 << kLast<SIGNED>);

// The decade E of a share in [0, 1], as 2^E and 10^-(E - LAST).
struct Decade {
  float steps, tens;
};

template <bool SIGNED, int E = kFirst<SIGNED>>
BIGKERN_HD Decade decade_of(float share, Decade found = {float(1 << kFirst<SIGNED>), 1e6f}) {
  if constexpr (E == kLast<SIGNED>) {
    return found;
  } else {
    constexpr Decade next = {float(2 << E), 1.0f / kTens[E + 1 - kFirst<SIGNED>]};
    return decade_of<SIGNED, E + 1>(share, share > kAbove<SIGNED, E> ? next : found);
  }
}

// The number k of the value nearest to a share in [0, 1]; 0 for 0 and 2^(LAST + 1) for 1.
template <bool SIGNED>
BIGKERN_HD int nearest(float share) {
  if (share <= kSmallest<SIGNED>) return 0;
  if (share > kLargest<SIGNED>) return 2 << kLast<SIGNED>;
  const Decade d = decade_of<SIGNED>(share);
  const float place = (share * d.tens - 0.1f) * (1.0f / 0.9f) * d.steps;
  const float cell = place < 0.0f ? 0.0f : place;
  const int k = int(d.steps) + int(cell < d.steps - 1.0f ? cell : d.steps - 1.0f);
  return k;
}

template <bool SIGNED, int E = kFirst<SIGNED>>
BIGKERN_HD float tens_of(float k, float found = 1e-6f) {
  if constexpr (E == kLast<SIGNED>) {
    return found;
  } else {
    constexpr float next = kTens[E + 1 - kFirst<SIGNED>];
    return tens_of<SIGNED, E + 1>(k, k >= float(2 << E) ? next : found);
  }
}

// value(k) for k from 2^FIRST on, below 2^(LAST + 1).
template <bool SIGNED>
BIGKERN_HD float value_of(float k) {
  const float inverse_steps = detail::bits_float((254u - (detail::float_bits(k) >> 23)) << 23);
  return tens_of<SIGNED>(k) * (0.1f + 0.9f * (k * inverse_steps - 1.0f + 0.5f * inverse_steps));
}

BIGKERN_HD uint8_t encode_signed(float share) {
  const int k = nearest<true>(share < 0.0f ? -share : share);
  const int level = share < 0.0f ? -(k < 127 ? k : 127) : k;
  return uint8_t(127 + level);
}

BIGKERN_HD uint8_t encode_unsigned(float share) {
  const int k = nearest<false>(share);
  return uint8_t(k == 0 ? (share > 0.0f ? 1 : 0) : k - 1);
}

BIGKERN_HD float decode_signed(uint8_t code) {
  const int level = int(code) - 127;
  if (level == 0 || level == 128) return level == 0 ? 0.0f : 1.0f;
  const float magnitude = value_of<true>(float(level < 0 ? -level : level));
  return level < 0 ? -magnitude : magnitude;
}

BIGKERN_HD float decode_unsigned(uint8_t code) {
  if (code == 0 || code == 255) return code == 0 ? 0.0f : 1.0f;
  return value_of<false>(float(int(code) + 1));
}

}  // namespace bigkern::adam
