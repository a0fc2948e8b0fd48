// The CUDA names that need no emulation: keywords, vector types, error codes, math, bit tricks.
//
// They live in the global namespace because that is where CUDA has them. Only what the kernels of
// this project use is here; a missing name is a compile error, never a silent difference.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

// ---- keywords ----------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

#if defined(__SANITIZE_ADDRESS__)
#define BIGKERN_SIMT_ASAN 1
#endif

// One block runs at a time, but for cooperative launches, whose kernels must not have any: so one
// copy of a __shared__ variable is enough. As a thread_local it
// lies in a segment that the emulator can find and fill with NaN before each block; under
// AddressSanitizer it is an ordinary static instead, because only those get red zones.
#if defined(BIGKERN_SIMT_ASAN)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

// ---- vector types ------------------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- runtime types -----------------------------------------------------------------------------

struct CUstream_st;
using cudaStream_t = CUstream_st*;

// The values are CUDA's own.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
};

// ---- math --------------------------------------------------------------------------------------

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }

// The C library reserves these spellings too; the exception specification has to match its own.
inline float __expf(float x) noexcept { return expf(x); }
inline float __logf(float x) noexcept { return logf(x); }
inline float __log2f(float x) noexcept { return log2f(x); }
inline float __powf(float x, float y) noexcept { return powf(x, y); }

// CUDA's min and max accept mixed integer types; so do these.
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(a) < T(b) ? T(b) : T(a);
}

// ---- bits --------------------------------------------------------------------------------------

namespace bigkern::simt {
template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace bigkern::simt

inline unsigned __float_as_uint(float x) { return bigkern::simt::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return bigkern::simt::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return bigkern::simt::bit_cast<float>(x); }
inline float __int_as_float(int x) { return bigkern::simt::bit_cast<float>(x); }
inline int __float2int_rn(float x) { return int(nearbyintf(x)); }
inline int __float2int_rz(float x) { return int(x); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }

// ---- memory ------------------------------------------------------------------------------------

// Hints to the caches of a GPU; here they are plain accesses.
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, std::common_type_t<T> value) {
  *address = value;
}

// A thread runs alone until it waits, so every plain read-modify-write is already atomic and every
// store already visible.
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace bigkern::simt {
template <class T, class... Allowed>
constexpr bool is_one_of = (std::is_same_v<T, Allowed> || ...);

template <class T>
T exchange(T* address, T desired) {
  const T old = *address;
  *address = desired;
  return old;
}
}  // namespace bigkern::simt

template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  static_assert(bigkern::simt::is_one_of<T, int, unsigned, unsigned long long, float, double>,
                "CUDA has no such atomicAdd");
  return bigkern::simt::exchange(address, T(*address + value));
}
template <class T>
T atomicMax(T* address, std::common_type_t<T> value) {
  static_assert(bigkern::simt::is_one_of<T, int, unsigned, long long, unsigned long long>,
                "CUDA has no such atomicMax");
  return bigkern::simt::exchange(address, max(*address, value));
}
template <class T>
T atomicMin(T* address, std::common_type_t<T> value) {
  static_assert(bigkern::simt::is_one_of<T, int, unsigned, long long, unsigned long long>,
                "CUDA has no such atomicMin");
  return bigkern::simt::exchange(address, min(*address, value));
}
template <class T>
T atomicExch(T* address, std::common_type_t<T> value) {
  static_assert(bigkern::simt::is_one_of<T, int, unsigned, unsigned long long, float>,
                "CUDA has no such atomicExch");
  return bigkern::simt::exchange(address, value);
}
template <class T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> desired) {
  static_assert(bigkern::simt::is_one_of<T, int, unsigned, unsigned long long>,
                "CUDA has no such atomicCAS");
  return bigkern::simt::exchange(address, *address == expected ? desired : *address);
}
// Counts up to limit and then starts again at zero.
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return bigkern::simt::exchange(address, *address >= limit ? 0u : *address + 1u);
}
