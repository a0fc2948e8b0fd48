// The one place that decides what "CUDA" is.
//
// A kernel includes this file and is ordinary CUDA C++. nvcc gives it the real thing; a host
// compiler with -DBIGKERN_SIMT gives it the emulator in tests/simt, so that the same source runs,
// and is tested, on a machine without a GPU.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "common/dtypes.h"

#if defined(BIGKERN_SIMT)
#include "simt/simt.h"
#else
#include <cuda_runtime.h>
#endif

namespace bigkern {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xffffffffu;

#if defined(BIGKERN_SIMT)

// The block's dynamic shared memory: 128-byte aligned, NaN until written, fenced at both ends.
template <class T>
T* dynamic_smem() {
  return reinterpret_cast<T*>(simt::dynamic_smem());
}

// Faults where the GPU would: a vector access must be aligned to its own size.
template <int BYTES>
void assert_aligned(const void* address, simt::Site site = simt::Site::here()) {
  simt::check_aligned(address, BYTES, site);
}

#else

// The block's dynamic shared memory, 128-byte aligned. This is the only way to reach it.
template <class T>
__device__ __forceinline__ T* dynamic_smem() {
  extern __shared__ __align__(128) unsigned char bigkern_dynamic_smem[];
  return reinterpret_cast<T*>(bigkern_dynamic_smem);
}

// The GPU itself faults on a misaligned vector access; only the emulator has to check.
template <int BYTES>
__device__ __forceinline__ void assert_aligned(const void*) {}

#endif

}  // namespace bigkern
