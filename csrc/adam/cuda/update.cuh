// The Adam update with moments stored as numbers: all parameters of a call in one grid, one pass
// over memory. Moments of 8 bits: update_codes.cuh.
//
// A block takes a chunk of kChunk elements of one parameter (chunks.cuh), a thread one group of
// neighbours after the other, at most 16 bytes of each array:
//
//   thread     0   1   2   3   ...     255  0   1
//   array      ####----####----   ...  ----|####----     load p g m v (vmax) -> store p m v (vmax)
//
// A group is 4 elements where anything is stored in fp32, otherwise 8. Bytes an
// element: fp32 28; fp32 with bf16 moments 20; bf16 14; bf16 with fp32 moments 22, with remainders
// besides 26. The learning rate, gradient scale and norm, found_inf and the counts of steps are
// read on the device: the host waits for nothing.
#pragma once

#include "adam/cuda/step.cuh"

namespace bigkern::adam::cuda {

constexpr int kChunk = 4096;  // elements; 56 to 112 KB of traffic

// v and vmax at random to bf16, by the same bits, before they are stored.
template <bool AMSGRAD, int N>
__device__ __forceinline__ void round_squares(const Draw& draw, Elements<N>& e) {
  uint32_t bits[N];
  random_bits(draw, kSquares, bits);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    e.v[k] = rounded_at_random(e.v[k], bits[k]);
    if (AMSGRAD) e.vmax[k] = rounded_at_random(e.vmax[k], bits[k]);
  }
}

// Elements i to i + N - 1 of one parameter; the addresses are aligned to N of them.
template <class P, class M, bool AMSGRAD, int N>
__device__ __forceinline__ void update_elements(const Step& step, int64_t i) {
  const Parameter x = step.x;  // a copy: the table's addresses would be read again after each store
  Elements<N> e;
  load_p<P>(x, step.table.master, i, e.p);
  load<P>(x.g, i, e.g);
  load<M>(x.m, i, e.m);
  load<M>(x.v, i, e.v);
  if (AMSGRAD) load<M>(x.vmax, i, e.vmax);
  step.leave_g<P>(x, i, e.g);
  step.update<AMSGRAD>(e);
  if (std::is_same_v<M, bf16> && step.table.stochastic) round_squares<AMSGRAD>(step.draw(i), e);
  step.keep_p<P>(x, i, e.p);
  store<M>(x.m, i, e.m);
  store<M>(x.v, i, e.v);
  if (AMSGRAD) store<M>(x.vmax, i, e.vmax);
}

template <class P, class M, bool AMSGRAD>
__global__ __launch_bounds__(kThreads, (kResident<kGroup<P, M>>)) void update_kernel(
    const __grid_constant__ Table table) {
  if (table.skipped()) return;
  constexpr int N = kGroup<P, M>;
  const Share share = share_of<kChunk>(table.chunks, int(blockIdx.x));
  const Step step(table, table.chunks.parameters[share.parameter]);
  const int64_t grouped = vectorizable(step.x) ? (share.end - share.begin) / N * N : 0;
  const int64_t whole = share.begin + grouped;
  for (int64_t i = share.begin + int(threadIdx.x) * N; i < whole; i += kThreads * N) {
    update_elements<P, M, AMSGRAD, N>(step, i);
  }
  for (int64_t i = whole + int(threadIdx.x); i < share.end; i += kThreads) {
    update_elements<P, M, AMSGRAD, 1>(step, i);
  }
}

}  // namespace bigkern::adam::cuda
