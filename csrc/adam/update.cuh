// The Adam update's kernels: all parameters of a call in one grid, one pass over memory.
//
// A parameter is cut into chunks of kChunk elements, one block each; the table says where each
// parameter's chunks begin, and a block finds its own by binary search:
//
//   parameter        |     0     |  1  |        2        | 3 |
//   chunk = block    |0 |1 |2 |3 |4 |5 |6 |7 |8 |9 |10|11|12 |        first_chunk = 0 4 6 12 (13)
//
//   thread 0   1   2 ...  255   0   1 ...      16 bytes of each array at a time, side by side
//   p      ####----####----     ->  load p g m v (vmax), store p m v (vmax): 28 bytes an element in
//   fp32
//
// The table travels as a kernel parameter (32 KB since CUDA 12.1). So nothing has to be allocated,
// copied or kept alive, and a CUDA graph replays it as it was captured. kCapacity parameters fit; a
// longer list takes more launches. The learning rate, gradient scale, found_inf and step counts are
// read on the device: the host waits for nothing.
//
// Kingma and Ba, Adam: A Method for Stochastic Optimization, 2015.
#pragma once

#include "adam/adam.h"
#include "common/cuda.cuh"
#include "common/reduce.cuh"

namespace bigkern::adam::cuda {

constexpr int kThreads = 256;
constexpr int kChunk = 4096;    // elements; 112 KB of traffic in fp32
constexpr int kCapacity = 352;  // parameters in a table

// Up to kCapacity parameters of one call.
struct Table {
  Constants constants;
  const float *grad_scale, *found_inf, *lr_tensor;  // null where not given
  int count;
  int first_chunk[kCapacity + 1];
  Parameter parameters[kCapacity];
};
static_assert(sizeof(Table) <= 32764, "a kernel takes at most 32764 bytes of parameters");

// N neighbouring elements of one parameter, in fp32.
template <int N>
struct Elements {
  float p[N], g[N], m[N], v[N], vmax[N];
};

template <bool AMSGRAD, int N>
__device__ __forceinline__ void step(Elements<N>& x, const Constants& c, const Factors& f) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float p = x.p[i] * f.decay;
    float g = x.g[i] * c.sign;
    if (c.l2 != 0.0f) g = fmaf(c.l2, p, g);
    x.m[i] = fmaf(c.one_minus_beta1, g - x.m[i], x.m[i]);
    x.v[i] = fmaf(c.one_minus_beta2, g * g, c.beta2 * x.v[i]);
    float v = x.v[i];
    if (AMSGRAD) {
      v = x.vmax[i] > v ? x.vmax[i] : v;  // a NaN in v stays
      x.vmax[i] = v;
    }
    x.p[i] = p - f.step_size * x.m[i] / fmaf(sqrtf(v), f.inv_sqrt_bias, c.eps);
  }
}

// Elements i to i + N - 1; the addresses are aligned to N of them.
template <class T, bool AMSGRAD, int N>
__device__ __forceinline__ void update_elements(const Parameter& a, int64_t i, const Constants& c,
                                                const Factors& f, const float* grad_scale) {
  T* const p = static_cast<T*>(a.p) + i;
  T* const g = static_cast<T*>(a.g) + i;
  T* const m = static_cast<T*>(a.m) + i;
  T* const v = static_cast<T*>(a.v) + i;
  T* const vmax = static_cast<T*>(a.vmax) + i;
  Elements<N> x;
  load_vec<T, N>(p, x.p);
  load_vec<T, N>(g, x.g);
  load_vec<T, N>(m, x.m);
  load_vec<T, N>(v, x.v);
  if (AMSGRAD) load_vec<T, N>(vmax, x.vmax);
  if (grad_scale != nullptr) {
    const float scale = *grad_scale;
#pragma unroll
    for (int k = 0; k < N; ++k) x.g[k] /= scale;
    store_vec<T, N>(g, x.g);
  }
  step<AMSGRAD>(x, c, f);
  store_vec<T, N>(p, x.p);
  store_vec<T, N>(m, x.m);
  store_vec<T, N>(v, x.v);
  if (AMSGRAD) store_vec<T, N>(vmax, x.vmax);
}

// The parameter whose chunks include `chunk`; one without elements has none.
__device__ __forceinline__ int parameter_of(const Table& table, int chunk) {
  int low = 0, high = table.count;  // first_chunk[low] <= chunk < first_chunk[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Whether all arrays of a parameter are aligned for 16-byte accesses. Views may start anywhere.
__device__ __forceinline__ bool vectorizable(const Parameter& x) {
  const uintptr_t all = reinterpret_cast<uintptr_t>(x.p) | reinterpret_cast<uintptr_t>(x.g) |
                        reinterpret_cast<uintptr_t>(x.m) | reinterpret_cast<uintptr_t>(x.v) |
                        reinterpret_cast<uintptr_t>(x.vmax);
  return all % 16 == 0;
}

template <class T, bool AMSGRAD>
__global__ __launch_bounds__(kThreads) void update_kernel(const __grid_constant__ Table table) {
  if (table.found_inf != nullptr && *table.found_inf != 0.0f) return;
  constexpr int N = kVecWidth<T>;
  const int index = parameter_of(table, int(blockIdx.x));
  const Parameter& x = table.parameters[index];
  const Constants& c = table.constants;
  const float lr = table.lr_tensor != nullptr ? *table.lr_tensor : c.lr;
  const Factors f = factors_of(c, lr, *x.step + 1.0f);

  const int64_t begin = int64_t(int(blockIdx.x) - table.first_chunk[index]) * kChunk;
  const int64_t end = begin + kChunk < x.n ? begin + kChunk : x.n;
  const int64_t whole = vectorizable(x) ? begin + (end - begin) / N * N : begin;
  for (int64_t i = begin + int(threadIdx.x) * N; i < whole; i += kThreads * N) {
    update_elements<T, AMSGRAD, N>(x, i, c, f, table.grad_scale);
  }
  for (int64_t i = whole + int(threadIdx.x); i < end; i += kThreads) {
    update_elements<T, AMSGRAD, 1>(x, i, c, f, table.grad_scale);
  }
}

// Runs after update_kernel: every block of that has to read the old counts.
__global__ __launch_bounds__(kThreads) void advance_kernel(const __grid_constant__ Table table) {
  if (table.found_inf != nullptr && *table.found_inf != 0.0f) return;
  for (int i = int(threadIdx.x); i < table.count; i += kThreads) *table.parameters[i].step += 1.0f;
}

}  // namespace bigkern::adam::cuda
