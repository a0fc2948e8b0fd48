// What the update's kernels share: their argument, the numbers of a chunk, and the step itself on
// elements in registers. How m and v are stored is each kernel's own matter.
//
// Kingma and Ba, Adam: A Method for Stochastic Optimization, 2015.
#pragma once

#include "adam/adam.h"
#include "adam/cuda/chunks.cuh"
#include "adam/cuda/storage.cuh"

namespace bigkern::adam::cuda {

constexpr int kThreads = 256;

// Blocks that a processor holds at least, where threads hold N elements: 64 and 80 registers.
template <int N>
constexpr int kResident = N == 4 ? 4 : 3;

// Up to kCapacity parameters of one call.
struct Table {
  Constants constants;
  const float *grad_scale, *found_inf, *lr_tensor, *grad_norm;  // null where not given
  uint64_t seed;
  float max_norm;
  Master master;
  bool zero_grads, stochastic;
  Chunks chunks;

  __device__ __forceinline__ bool skipped() const {
    return found_inf != nullptr && *found_inf != 0.0f;
  }
};
static_assert(sizeof(Table) <= kLargestArgument, "a kernel's parameters are limited");

// N neighbouring elements of one parameter, in fp32.
template <int N>
struct Elements {
  float p[N], g[N], m[N], v[N], vmax[N];
};

// One step of one parameter: what all of its elements have in common, in registers.
struct Step {
  const Table& table;
  const Parameter& x;
  Factors factors;
  float scale;     // g is divided by it, where table.grad_scale is given
  float g_factor;  // sign, and clipping
  uint32_t t;

  __device__ __forceinline__ Step(const Table& table_, const Parameter& x_)
      : table(table_), x(x_), scale(1.0f), g_factor(table_.constants.sign) {
    const float lr = table.lr_tensor != nullptr ? *table.lr_tensor : table.constants.lr;
    const float steps = *x.step + 1.0f;
    factors = factors_of(table.constants, lr, steps);
    t = uint32_t(steps);
    if (table.grad_scale != nullptr) scale = *table.grad_scale;
    if (table.grad_norm != nullptr) g_factor *= clip_of(*table.grad_norm / scale, table.max_norm);
  }

  __device__ __forceinline__ Draw draw(int64_t i) const { return {table.seed, t, x.before + i}; }

  template <class P, int N>
  __device__ __forceinline__ void keep_p(const Parameter& x, int64_t i, float (&p)[N]) const {
    store_p<P>(x, table.master, table.stochastic, draw(i), i, p);
  }

  // What the call leaves of the gradients from i on: g divided by its scale, or 0.
  template <class P, int N>
  __device__ __forceinline__ void leave_g(const Parameter& x, int64_t i, float (&g)[N]) const {
    if (table.grad_scale != nullptr) {
#pragma unroll
      for (int k = 0; k < N; ++k) g[k] /= scale;
    }
    if (table.zero_grads) {
      const float zeros[N] = {};
      store<P>(x.g, i, zeros);
    } else if (table.grad_scale != nullptr) {
      store<P>(x.g, i, g);
    }
  }

  template <bool AMSGRAD, int N>
  __device__ __forceinline__ void update(Elements<N>& e) const {
    const Constants& c = table.constants;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float p = e.p[k] * factors.decay;
      float g = e.g[k] * g_factor;
      if (c.l2 != 0.0f) g = fmaf(c.l2, p, g);
      e.m[k] = fmaf(c.one_minus_beta1, g - e.m[k], e.m[k]);
      e.v[k] = fmaf(c.one_minus_beta2, g * g, c.beta2 * e.v[k]);
      float v = e.v[k];
      if (AMSGRAD) {
        v = e.vmax[k] > v ? e.vmax[k] : v;  // a NaN in v stays
        e.vmax[k] = v;
      }
      const float denominator = fmaf(sqrtf(v), factors.inv_sqrt_bias, c.eps);
      e.p[k] = p - factors.step_size * e.m[k] / denominator;
    }
  }
};

// Whether all arrays of a parameter are aligned for 16-byte accesses. Views may start anywhere.
__device__ __forceinline__ bool vectorizable(const Parameter& x) {
  const uintptr_t all = reinterpret_cast<uintptr_t>(x.p) | reinterpret_cast<uintptr_t>(x.g) |
                        reinterpret_cast<uintptr_t>(x.m) | reinterpret_cast<uintptr_t>(x.v) |
                        reinterpret_cast<uintptr_t>(x.vmax) | reinterpret_cast<uintptr_t>(x.master);
  return all % 16 == 0;
}

// Runs after the update: every block of that has to read the old counts.
__global__ __launch_bounds__(kThreads) void advance_kernel(const __grid_constant__ Table table) {
  if (table.skipped()) return;
  for (int i = int(threadIdx.x); i < table.chunks.count; i += kThreads) {
    *table.chunks.parameters[i].step += 1.0f;
  }
}

}  // namespace bigkern::adam::cuda
