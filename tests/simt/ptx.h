// The emulator's side of csrc/common/cuda/ptx.cuh: the same names, the same fragment layouts.
#pragma once

#include "common/dtypes.h"
#include "simt/simt.h"

namespace bigkern {
namespace ptx {

using simt::Site;

namespace detail {

constexpr uint32_t kAllLanes = 0xffffffffu;

template <class T>
float half_of(uint32_t pair, int half) {
  return to_float(T{uint16_t(pair >> (16 * half))});
}

// What one lane brings to a matrix product.
struct MmaLane {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// D[16][8] += A[16][K] * B[K][8], from and to the accumulator fragments of a warp.
template <int K>
void multiply(const float (&a)[16][K], const float (&b)[K][8], void* const* lanes) {
  float product[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < K; ++k) {
      for (int col = 0; col < 8; ++col) product[row][col] += a[row][k] * b[k][col];
    }
  }
  for (int lane = 0; lane < warpSize; ++lane) {
    float* d = static_cast<MmaLane*>(lanes[lane])->d;
    const int row = lane / 4;
    const int col = lane % 4 * 2;
    d[0] += product[row][col];
    d[1] += product[row][col + 1];
    d[2] += product[row + 8][col];
    d[3] += product[row + 8][col + 1];
  }
}

template <class T>
void execute_mma_m16n8k16(void* const* lanes, uint32_t) {
  float a[16][16];
  float b[16][8];
  for (int lane = 0; lane < warpSize; ++lane) {
    const MmaLane& fragment = *static_cast<MmaLane*>(lanes[lane]);
    const int group = lane / 4;
    const int pair = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      a[group][pair + half] = half_of<T>(fragment.a[0], half);
      a[group + 8][pair + half] = half_of<T>(fragment.a[1], half);
      a[group][pair + 8 + half] = half_of<T>(fragment.a[2], half);
      a[group + 8][pair + 8 + half] = half_of<T>(fragment.a[3], half);
      b[pair + half][group] = half_of<T>(fragment.b[0], half);
      b[pair + 8 + half][group] = half_of<T>(fragment.b[1], half);
    }
  }
  multiply(a, b, lanes);
}

// The tensor core does not look at the bits that tf32 lacks.
inline float read_tf32(uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); }

inline void execute_mma_m16n8k8_tf32(void* const* lanes, uint32_t) {
  float a[16][8];
  float b[8][8];
  for (int lane = 0; lane < warpSize; ++lane) {
    const MmaLane& fragment = *static_cast<MmaLane*>(lanes[lane]);
    const int group = lane / 4;
    const int quad = lane % 4;
    a[group][quad] = read_tf32(fragment.a[0]);
    a[group + 8][quad] = read_tf32(fragment.a[1]);
    a[group][quad + 4] = read_tf32(fragment.a[2]);
    a[group + 8][quad + 4] = read_tf32(fragment.a[3]);
    b[quad][group] = read_tf32(fragment.b[0]);
    b[quad + 4][group] = read_tf32(fragment.b[1]);
  }
  multiply(a, b, lanes);
}

// What one lane brings to ldmatrix.
struct LdmatrixLane {
  uint32_t* registers;
  const void* row;
};

template <int MATRICES, bool TRANSPOSED>
void execute_ldmatrix(void* const* lanes, uint32_t) {
  for (int matrix = 0; matrix < MATRICES; ++matrix) {
    uint16_t values[8][8];
    for (int row = 0; row < 8; ++row) {
      memcpy(values[row], static_cast<LdmatrixLane*>(lanes[8 * matrix + row])->row, 16);
    }
    for (int lane = 0; lane < warpSize; ++lane) {
      const int row = lane / 4;
      const int col = lane % 4 * 2;
      const uint32_t lo = TRANSPOSED ? values[col][row] : values[row][col];
      const uint32_t hi = TRANSPOSED ? values[col + 1][row] : values[row][col + 1];
      static_cast<LdmatrixLane*>(lanes[lane])->registers[matrix] = lo | hi << 16;
    }
  }
}

template <int MATRICES, bool TRANSPOSED>
void ldmatrix(const char* name, uint32_t* registers, const void* smem_row, Site site) {
  if (simt::lane_id() < 8 * MATRICES) simt::check_aligned(smem_row, 16, site);
  LdmatrixLane self{registers, smem_row};
  simt::warp_op(name, kAllLanes, &self, execute_ldmatrix<MATRICES, TRANSPOSED>, site);
}

}  // namespace detail

// ---- matrix products on tensor cores -----------------------------------------------------------

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Site site = Site::here()) {
  detail::MmaLane self{d, a, b};
  simt::warp_op("mma_m16n8k16", detail::kAllLanes, &self, detail::execute_mma_m16n8k16<T>, site);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Site site = Site::here()) {
  detail::MmaLane self{d, a, b};
  simt::warp_op("mma_m16n8k8_tf32", detail::kAllLanes, &self, detail::execute_mma_m16n8k8_tf32,
                site);
}

inline uint32_t to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fffe000u;
  return (isinf(value) ? bits : bits + 0x1000u) & 0xffffe000u;
}

// ---- shared memory to fragments ----------------------------------------------------------------

inline void ldmatrix_x4(uint32_t (&r)[4], const void* smem_row, Site site = Site::here()) {
  detail::ldmatrix<4, false>("ldmatrix_x4", r, smem_row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem_row, Site site = Site::here()) {
  detail::ldmatrix<4, true>("ldmatrix_x4_trans", r, smem_row, site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* smem_row, Site site = Site::here()) {
  detail::ldmatrix<2, false>("ldmatrix_x2", r, smem_row, site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem_row, Site site = Site::here()) {
  detail::ldmatrix<2, true>("ldmatrix_x2_trans", r, smem_row, site);
}

// ---- asynchronous copies from global to shared memory ------------------------------------------

inline void cp_async_16(void* smem, const void* gmem, bool valid, Site site = Site::here()) {
  simt::async_copy(smem, gmem, 16, valid, site);
}
inline void cp_async_8(void* smem, const void* gmem, bool valid, Site site = Site::here()) {
  simt::async_copy(smem, gmem, 8, valid, site);
}
inline void cp_async_4(void* smem, const void* gmem, bool valid, Site site = Site::here()) {
  simt::async_copy(smem, gmem, 4, valid, site);
}
inline void cp_async_commit() { simt::async_commit(); }
template <int N>
void cp_async_wait() {
  simt::async_wait(N);
}

// ---- vector stores to global memory ------------------------------------------------------------

inline void store_global(void* gmem, const uint4& words, Site site = Site::here()) {
  simt::check_aligned(gmem, sizeof words, site);
  memcpy(gmem, &words, sizeof words);
}
inline void store_global(void* gmem, const uint2& words, Site site = Site::here()) {
  simt::check_aligned(gmem, sizeof words, site);
  memcpy(gmem, &words, sizeof words);
}

// ---- barriers between some warps of a block ----------------------------------------------------

inline void named_barrier_sync(int id, int threads, Site site = Site::here()) {
  simt::named_barrier(id, threads, true, site);
}
inline void named_barrier_arrive(int id, int threads, Site site = Site::here()) {
  simt::named_barrier(id, threads, false, site);
}

// ---- between blocks ----------------------------------------------------------------------------

inline void add_release(unsigned* counter, unsigned value) { *counter += value; }
inline void wait_at_least(const unsigned* counter, unsigned value, Site site = Site::here()) {
  simt::wait_at_least(counter, value, site);
}

// ---- fast math and packing ---------------------------------------------------------------------

namespace detail {
inline float flush_subnormal(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
}  // namespace detail

inline float exp2_approx(float x) { return detail::flush_subnormal(exp2f(x)); }
inline float rcp_approx(float x) {
  return detail::flush_subnormal(1.0f / detail::flush_subnormal(x));
}

template <class T>
uint32_t pack2(float lo, float hi) {
  return from_float<T>(lo).bits | uint32_t(from_float<T>(hi).bits) << 16;
}

template <class T>
float2 unpack2(uint32_t packed) {
  return make_float2(detail::half_of<T>(packed, 0), detail::half_of<T>(packed, 1));
}

}  // namespace ptx
}  // namespace bigkern
