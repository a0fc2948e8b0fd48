// Storage types and their conversions, for the host and for the device.
//
// A kernel stores bf16 and fp16 and computes in float: the two functions here are the only casts
// there are. They need no CUDA header on the host, so that the vectorised CPU kernels and the
// emulator (tests/simt) share them with nvcc. Rounding is to nearest, ties to even, everywhere;
// infinities, NaNs and subnormals survive both ways.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define BIGKERN_HD __host__ __device__ __forceinline__
#else
#define BIGKERN_HD inline __attribute__((always_inline))
#if defined(__F16C__)
#include <immintrin.h>
#endif
#endif

namespace bigkern {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

enum class Dtype : int { f32, bf16, f16 };

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr Dtype value = Dtype::f32;
};
template <>
struct DtypeOf<bf16> {
  static constexpr Dtype value = Dtype::bf16;
};
template <>
struct DtypeOf<fp16> {
  static constexpr Dtype value = Dtype::f16;
};

namespace detail {

BIGKERN_HD uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

BIGKERN_HD float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Half to float without a branch on the common path: the exponent is rebased by a multiplication,
// which also normalises subnormals.
inline float half_to_float_bits(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(half & 0x7fffu);
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  const float rebased = bits_float(magnitude << 13) * bits_float((127u + 112u) << 23);
  return bits_float(sign | float_bits(rebased));
}

inline uint16_t float_to_half_bits(float value) {
  const uint32_t bits = float_bits(value);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u | uint16_t(magnitude >> 13 & 0x1ffu);
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal result: adding 0.5 lines the units of the half up with the float's last bit, and
    // the addition itself rounds to nearest even.
    return sign | uint16_t(float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u);
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return sign | uint16_t((rounded - (112u << 23)) >> 13);
}

}  // namespace detail

BIGKERN_HD float to_float(float value) { return value; }

BIGKERN_HD float to_float(bf16 value) { return detail::bits_float(uint32_t(value.bits) << 16); }

BIGKERN_HD float to_float(fp16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#elif defined(__F16C__) && !defined(__CUDACC__)
  return _cvtsh_ss(value.bits);
#else
  return detail::half_to_float_bits(value.bits);
#endif
}

template <class T>
BIGKERN_HD T from_float(float value);

template <>
BIGKERN_HD float from_float<float>(float value) {
  return value;
}

template <>
BIGKERN_HD bf16 from_float<bf16>(float value) {
#if defined(__CUDA_ARCH__)
  return bf16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = detail::float_bits(value);
  const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  const uint32_t quiet_nan = bits | 0x400000u;
  return bf16{uint16_t(((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded) >> 16)};
#endif
}

template <>
BIGKERN_HD fp16 from_float<fp16>(float value) {
#if defined(__CUDA_ARCH__)
  return fp16{__half_as_ushort(__float2half_rn(value))};
#elif defined(__F16C__) && !defined(__CUDACC__)
  return fp16{uint16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#else
  return fp16{detail::float_to_half_bits(value)};
#endif
}

}  // namespace bigkern
