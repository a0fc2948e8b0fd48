// A barrier of all blocks that share a counter, in two halves: what needs no other block's results
// stands between them, and its loads travel while the block waits.
//
//   write what others will read;  grid_arrive(counter);  ...  grid_wait(counter, blocks * round)
//
// The counter lies in global memory, starts at zero and only rises: by one with every block's
// arrival. The launch is cooperative. All threads of the block call both.
#pragma once

#include "common/cuda/ptx.cuh"

namespace bigkern {

__device__ __forceinline__ void grid_arrive(unsigned* counter) {
  __syncthreads();
  if (threadIdx.x == 0) ptx::add_release(counter, 1);
}

__device__ __forceinline__ void grid_wait(const unsigned* counter, unsigned arrivals) {
  if (threadIdx.x == 0) ptx::wait_at_least(counter, arrivals);
  __syncthreads();
}

}  // namespace bigkern
