// The tables of instantiations, and how a launcher picks from them.
#pragma once

#include "common/cuda/launch.cuh"
#include "layernorm_ffn/layernorm_ffn.h"

namespace bigkern::layernorm_ffn::cuda {

// One compiled kernel, and the rows it is for.
template <class Function>
struct Kernel {
  const char* name;
  Dtype dtype;
  int64_t max_columns;
  bool vector;        // needs rows aligned to 16 bytes
  int threads, rows;  // of a block
  Function function;
};

// The first kernel of the table that fits; every table ends with one that takes everything.
template <class Function, size_t COUNT>
const Kernel<Function>* find(const Kernel<Function> (&table)[COUNT], Dtype dtype, int64_t N,
                             bool aligned) {
  for (const Kernel<Function>& kernel : table) {
    if (kernel.dtype == dtype && N <= kernel.max_columns && (aligned || !kernel.vector)) {
      return &kernel;
    }
  }
  return nullptr;
}

template <class Function, size_t COUNT>
int list(const Kernel<Function> (&table)[COUNT], KernelInfo* out, int capacity) {
  for (int i = 0; i < int(COUNT) && i < capacity; ++i) {
    out[i] = kernel_info(table[i].name, table[i].function, 0);
  }
  return int(COUNT);
}

constexpr int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Whether rows of N elements behind all these pointers start at multiples of 16 bytes.
template <class... Pointers>
bool rows_aligned(Dtype dtype, int64_t N, Pointers... pointers) {
  const uintptr_t bits = (reinterpret_cast<uintptr_t>(pointers) | ... | 0);
  return (bits | uintptr_t(N * bytes_of(dtype))) % 16 == 0;
}

}  // namespace bigkern::layernorm_ffn::cuda
