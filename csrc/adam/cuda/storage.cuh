// How p, g and the moments of neighbouring elements come out of storage and go back.
//
//   p without master      P                                       nearest, or at random to bf16
//   p with fp32 master    float, read and written     P written   nearest
//   p with remainder      bf16 and int16, read and written        the same 32 bits
//   m                     M                                       nearest
//   v, vmax               M                                       nearest, or at random to bf16
//   g                     P, read; written where it was scaled, or as zeros
//
// Rounding at random adds 16 random bits below bf16's last one and cuts them off: up or down in
// proportion to the distances. What it leaves in a float is a bf16 already, so that the store that
// follows, to nearest, changes nothing.
#pragma once

#include <algorithm>
#include <type_traits>

#include "adam/adam.h"
#include "adam/remainder.h"
#include "common/cuda/cuda.cuh"
#include "common/cuda/reduce.cuh"

namespace bigkern::adam::cuda {

// As many elements as keep the widest of the types within one 16-byte access.
template <class... T>
constexpr int kGroup = 16 / int(std::max({sizeof(T)...}));

// N neighbours in accesses of at most 16 bytes, which the address is aligned to.
template <class T, int N>
__device__ __forceinline__ void load(const void* array, int64_t i, float (&x)[N]) {
  constexpr int W = N < kVecWidth<T> ? N : kVecWidth<T>;
#pragma unroll
  for (int k = 0; k < N; k += W) {
    const Vec<T, W> packed = load_vec<T, W>(static_cast<const T*>(array) + i + k);
#pragma unroll
    for (int j = 0; j < W; ++j) x[k + j] = to_float(packed.data[j]);
  }
}

template <class T, int N>
__device__ __forceinline__ void store(void* array, int64_t i, const float (&x)[N]) {
  constexpr int W = N < kVecWidth<T> ? N : kVecWidth<T>;
#pragma unroll
  for (int k = 0; k < N; k += W) {
    Vec<T, W> packed;
#pragma unroll
    for (int j = 0; j < W; ++j) packed.data[j] = from_float<T>(x[k + j]);
    store_vec(static_cast<T*>(array) + i + k, packed);
  }
}

// ---- rounding at random -------------------------------------------------------------------------

// Where in the generator's sequence some neighbours are: the first one's position, and the step.
struct Draw {
  uint64_t seed;
  uint32_t t;
  int64_t position;
};

template <int N>
__device__ __forceinline__ void random_bits(const Draw& draw, uint32_t head, uint32_t (&bits)[N]) {
  DropoutRow row = random_row(draw.seed, head, draw.t, draw.position);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const uint32_t column = uint32_t(draw.position) + k;
    if (k > 0 && column == 0) row = random_row(draw.seed, head, draw.t, draw.position + k);
    bits[k] = row.bits(column);
  }
}

// x as one of its two neighbours in bf16, by the high half of random bits; infinities and NaN as
// they are.
__device__ __forceinline__ float rounded_at_random(float x, uint32_t bits) {
  const uint32_t raw = detail::float_bits(x);
  const uint32_t up = (raw + (bits >> 16)) & 0xffff0000u;
  return (raw & 0x7f800000u) == 0x7f800000u ? x : detail::bits_float(up);
}

// ---- p ------------------------------------------------------------------------------------------

template <class P, int N>
__device__ __forceinline__ void load_p(const Parameter& x, Master master, int64_t i,
                                       float (&p)[N]) {
  if constexpr (std::is_same_v<P, bf16>) {
    if (master == Master::remainder) {
      const auto upper = load_vec<bf16, N>(static_cast<bf16*>(x.p) + i);
      const auto rest = load_vec<int16_t, N>(static_cast<int16_t*>(x.master) + i);
#pragma unroll
      for (int k = 0; k < N; ++k) p[k] = join({upper.data[k], rest.data[k]});
      return;
    }
  }
  if (sizeof(P) == 2 && master == Master::f32) {
    load<float>(x.master, i, p);
  } else {
    load<P>(x.p, i, p);
  }
}

template <class P, int N>
__device__ __forceinline__ void store_p(const Parameter& x, Master master, bool stochastic,
                                        const Draw& draw, int64_t i, float (&p)[N]) {
  if constexpr (std::is_same_v<P, bf16>) {
    if (master == Master::remainder) {
      Vec<bf16, N> upper;
      Vec<int16_t, N> rest;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const Halves halves = split(p[k]);
        upper.data[k] = halves.p;
        rest.data[k] = halves.rest;
      }
      store_vec(static_cast<bf16*>(x.p) + i, upper);
      store_vec(static_cast<int16_t*>(x.master) + i, rest);
      return;
    }
    if (stochastic && master == Master::none) {
      uint32_t bits[N];
      random_bits(draw, kParameter, bits);
#pragma unroll
      for (int k = 0; k < N; ++k) p[k] = rounded_at_random(p[k], bits[k]);
    }
  }
  if (sizeof(P) == 2 && master == Master::f32) store<float>(x.master, i, p);
  store<P>(x.p, i, p);
}

}  // namespace bigkern::adam::cuda
