// The PTX instructions that CUDA C++ has no name for, one small function each.
//
// All inline assembly of the project is in this file; tests/simt/ptx.h holds functions of the same
// names for the emulator. Everything here exists since sm_80. Fragment layouts are those of the
// PTX ISA, with group = lane / 4 and quad = lane % 4:
//
//   m16n8k16, 16-bit A and B, two values to a register (lower column or row in the low half):
//     a[0] row group     cols 2*quad, +1        a[2] row group     cols 2*quad+8, +9
//     a[1] row group + 8 cols 2*quad, +1        a[3] row group + 8 cols 2*quad+8, +9
//     b[0] rows 2*quad, +1   col group          b[1] rows 2*quad+8, +9   col group
//   m16n8k8, tf32:
//     a[0] row group     col quad               a[2] row group     col quad + 4
//     a[1] row group + 8 col quad               a[3] row group + 8 col quad + 4
//     b[0] row quad      col group              b[1] row quad + 4  col group
//   accumulators of both, float:
//     d[0], d[1] row group      cols 2*quad, +1
//     d[2], d[3] row group + 8  cols 2*quad, +1
#pragma once

#include "common/cuda/cuda.cuh"

#if defined(BIGKERN_SIMT)
#include "simt/ptx.h"
#else

namespace bigkern {
namespace ptx {

// ---- matrix products on tensor cores -----------------------------------------------------------

// d += a * b, with T = bf16 or fp16 operands and float accumulators; the whole warp takes part.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<fp16>(float (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a * b with tf32 operands (see to_tf32).
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rounds to tf32 (10 bits of mantissa), ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// ---- shared memory to fragments ----------------------------------------------------------------

// 8x8 matrices of 16-bit values. Lane 8*i + j gives the 16-byte aligned address of row j of matrix
// i (x2 reads lanes 0-15 only); register i of lane l then holds row l / 4, columns 2*(l % 4), +1
// of matrix i. The _trans forms hand out the transposed matrices.

namespace detail {
__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}
}  // namespace detail

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(detail::smem_address(smem_row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(detail::smem_address(smem_row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(detail::smem_address(smem_row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(detail::smem_address(smem_row))
               : "memory");
}

// ---- asynchronous copies from global to shared memory ------------------------------------------

// Both addresses are aligned to the size. With valid == false nothing is read from gmem and the
// destination becomes zero. The data may be used after commit, wait and a barrier.

__device__ __forceinline__ void cp_async_16(void* smem, const void* gmem, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(detail::smem_address(smem)), "l"(gmem), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_8(void* smem, const void* gmem, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
               :
               : "r"(detail::smem_address(smem)), "l"(gmem), "r"(valid ? 8 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_4(void* smem, const void* gmem, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :
               : "r"(detail::smem_address(smem)), "l"(gmem), "r"(valid ? 4 : 0)
               : "memory");
}

// Closes this thread's current group of copies; an empty group counts too.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most N of this thread's groups, the newest ones, are still in flight.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- vector stores to global memory ------------------------------------------------------------

// One store instruction; the address is global and aligned to the size. An assignment of a vector,
// a uint4 too, nvcc 13.0 may turn into a store of each word or half word: it does where a branch
// stands before, as behind dropout. Loads of vectors it leaves whole.

__device__ __forceinline__ void store_global(void* gmem, const uint4& words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(gmem), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

__device__ __forceinline__ void store_global(void* gmem, const uint2& words) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};"
               :
               : "l"(gmem), "r"(words.x), "r"(words.y)
               : "memory");
}

// ---- barriers between some warps of a block ----------------------------------------------------

// Barrier id is 1 to 15 (0 belongs to __syncthreads); threads, a multiple of 32, counts those that
// sync and those that arrive together.

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- between blocks ----------------------------------------------------------------------------

// Adds to a counter in global memory, after everything that this thread wrote, and everything that
// it has seen written, is visible to the whole GPU.
__device__ __forceinline__ void add_release(unsigned* counter, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" : : "l"(counter), "r"(value) : "memory");
}

// Spins until the counter is value or more; what was written before the counter rose can then be
// read. Only a cooperative launch promises that the blocks which raise it run.
__device__ __forceinline__ void wait_at_least(const unsigned* counter, unsigned value) {
  unsigned seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen < value);
}

// ---- fast math and packing ---------------------------------------------------------------------

// 2^x within 2 ulp; subnormals are flushed to zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1/x within 1 ulp; subnormals are flushed to zero.
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to T = bf16 or fp16 in one register, lo in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float lo, float hi);

template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}

template <>
__device__ __forceinline__ uint32_t pack2<fp16>(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}

template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t packed) {
  return make_float2(to_float(T{uint16_t(packed)}), to_float(T{uint16_t(packed >> 16)}));
}

}  // namespace ptx
}  // namespace bigkern

#endif
