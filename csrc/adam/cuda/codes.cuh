// Moments of 8 bits on a GPU: dynamic8.h's numbers by tables in shared memory.
//
// Reading a code is a look-up of its value. Writing takes the nearest value of a share in [0, 1]:
// within a decade its number k lies on a line, so only the decade has to be found, and an octave,
// shares of one floating-point exponent, meets at most one border between decades:
//
//   octave    2^-23   2^-22   2^-21   2^-20   2^-19   ...   2^-1   2^0       border, row below it
//   rows        0      0|1      1      1|2      2     ...   7|8     8        line: k = a share + b
//
// Row 0 is nothing, rows 1 to 7 are the decades, row 8 is the 1 at the end. Two look-ups and 18
// instructions a number; dynamic8.h's chain of comparisons takes three times as many. The tables
// are 2.6 KB, made by the block itself from dynamic8.h's constants.
#pragma once

#include <cfloat>

#include "adam/dynamic8.h"
#include "common/cuda/cuda.cuh"

namespace bigkern::adam::cuda {

constexpr int kOctaves = 24;
constexpr int kRows = 9;
constexpr float kLowest = 1.0f / (1 << (kOctaves - 1));
constexpr int kLowestExponent = 128 - kOctaves;  // as floats store it

struct Octave {
  float border;  // shares above it are of the next row
  int row;
};

// k of a share is a share + b to the nearest integer, but no more than the decade's last one.
struct Line {
  float a, b;
  __device__ __forceinline__ float operator()(float share) const {
    const float last = fmaf(2.25f, b, 0.125f);  // 2^(d + 1) - 1, as b is 8/9 2^d - 1/2
    return fminf(fmaf(a, share, b), last);
  }
};

template <bool SIGNED>
struct Codebook {
  float value[256];
  Octave octave[kOctaves];
  Line line[kRows];

  // By all threads of a block of 256; a barrier has to follow.
  __device__ __forceinline__ void make(int thread) {
    value[thread] = SIGNED ? decode_signed(uint8_t(thread)) : decode_unsigned(uint8_t(thread));
    if (thread < kOctaves) octave[thread] = octave_from(kLowest * float(1 << thread));
    if (thread < kRows) line[thread] = line_of(thread);
  }

  // The number k of the value nearest to a share in [0, 1], not yet rounded.
  __device__ __forceinline__ float number(float share) const {
    share = fmaxf(share, kLowest);
    const Octave at = octave[int(detail::float_bits(share) >> 23) - kLowestExponent];
    return line[at.row + (share > at.border)](share);
  }

 private:
  // The octave of shares from `low` on.
  static __device__ __forceinline__ Octave octave_from(float low) {
    constexpr int F = kFirst<SIGNED>;
    constexpr float borders[] = {
        kSmallest<SIGNED>,     kAbove<SIGNED, F>,     kAbove<SIGNED, F + 1>, kAbove<SIGNED, F + 2>,
        kAbove<SIGNED, F + 3>, kAbove<SIGNED, F + 4>, kAbove<SIGNED, F + 5>, kLargest<SIGNED>};
    Octave found = {INFINITY, 0};
#pragma unroll
    for (int i = 7; i >= 0; --i) {
      if (borders[i] < low) {
        ++found.row;
      } else {
        found.border = borders[i];
      }
    }
    return found;
  }

  // Of a v that is not 0, nothing is k = 2.
  static __device__ __forceinline__ Line line_of(int row) {
    constexpr int F = kFirst<SIGNED>, L = kLast<SIGNED>;
    if (row == 0) return {0.0f, SIGNED ? 0.0f : 2.0f};
    if (row == kRows - 1) return {0.0f, float(2 << L)};
    const Decade d = decade_of<SIGNED>(value_of<SIGNED>(float(1 << (F + row - 1))));
    return {d.steps * d.tens * (1.0f / 0.9f), d.steps * (8.0f / 9.0f) - 0.5f};
  }
};

// A float as large as this has units in its last place: adding it rounds, and leaves an integer in
// the low bits.
constexpr float kUnits = 12582912.0f;

__device__ __forceinline__ uint8_t encode(const Codebook<true>& book, float m, float share) {
  const float level = fmaxf(copysignf(book.number(share), m), -127.0f);
  return uint8_t(detail::float_bits(level + (kUnits + 127.0f)));
}

__device__ __forceinline__ uint8_t encode(const Codebook<false>& book, float v, float share) {
  const float k = book.number(share);
  return v > 0.0f ? uint8_t(detail::float_bits(k + (kUnits - 1.0f))) : uint8_t(0);
}

// ---- a block's scale ----------------------------------------------------------------------------

// The larger of two magnitudes; a NaN is larger than all. Their bits compare as they do.
struct MagnitudeOp {
  __device__ __forceinline__ float operator()(float a, float b) const {
    return detail::bits_float(max(detail::float_bits(a), detail::float_bits(b)));
  }
};

// |x| / scale by a reciprocal. Where that would overflow, all of the block is subnormal, and shares
// come out too small. Beside a NaN or an infinity they mean nothing, but lie in [0, 1] too.
struct Shares {
  float reciprocal;
  explicit __device__ __forceinline__ Shares(float scale)
      : reciprocal(fminf(1.0f / scale, FLT_MAX)) {}
  __device__ __forceinline__ float operator()(float x) const {
    return __saturatef(fabsf(x) * reciprocal);
  }
};

}  // namespace bigkern::adam::cuda
