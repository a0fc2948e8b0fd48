// The Adam update with moments of 8 bits: one pass over memory, as update.cuh.
//
// A block of threads takes a chunk of one parameter, a warp one quantisation block of it after the
// other: 256 elements, 8 a lane, which stay in registers from the old scales to the new ones.
//
//   lane        0       1       2   ...    31            bf16: 16 bytes of p and g, 8 codes of m
//   elements    0-7     8-15    16-23      248-255       and v
//
//   codes, scales -> m v     step     largest |m| and v of the warp -> new scales -> codes
//
// fp32 p and g come in two groups, 128 elements apart: 16 bytes a lane, side by side. Bytes an
// element: bf16 10.1, with remainders 14.1; fp32 16.1.
#pragma once

#include "adam/cuda/codes.cuh"
#include "adam/cuda/step.cuh"

namespace bigkern::adam::cuda {

// Elements; 160 KB of traffic in bf16. What a block does once, the tables above all, would cost
// each element of a chunk of 4096 ten instructions.
constexpr int kCodesChunk = 16384;
constexpr int kPerLane = kBlock / kWarpSize;
static_assert(kThreads == 256 && kCodesChunk % kBlock == 0);

struct Codebooks {
  Codebook<true> m;
  Codebook<false> v;
};

template <bool SIGNED, int N>
__device__ __forceinline__ void load_codes(const Codebook<SIGNED>& book, float scale,
                                           const void* codes, int64_t i, float (&x)[N]) {
  const auto packed = load_vec<uint8_t, N>(static_cast<const uint8_t*>(codes) + i);
#pragma unroll
  for (int k = 0; k < N; ++k) x[k] = book.value[packed.data[k]] * scale;
}

template <bool SIGNED, int N>
__device__ __forceinline__ void store_codes(const Codebook<SIGNED>& book, const Shares& shares,
                                            void* codes, int64_t i, const float (&x)[N]) {
  Vec<uint8_t, N> packed;
#pragma unroll
  for (int k = 0; k < N; ++k) packed.data[k] = encode(book, x[k], shares(x[k]));
  store_vec(static_cast<uint8_t*>(codes) + i, packed);
}

// The 256 elements from `first` on, or those of them that exist, by a warp: N neighbours at a time.
template <class P, int N>
__device__ __forceinline__ void update_block(const Step& step, const Codebooks& books,
                                             int64_t first) {
  constexpr int G = kPerLane / N;
  const Parameter x = step.x;  // as in update.cuh
  const int lane = int(threadIdx.x) % kWarpSize;
  const int64_t block = first / kBlock, i = first + lane * N;
  Elements<N> e[G] = {};  // what does not exist is 0, and stays it
  float m_scale = x.m_scale[block], v_scale = x.v_scale[block];
#pragma unroll
  for (int k = 0; k < G; ++k) {
    const int64_t at = i + k * kWarpSize * N;
    if (N == 1 && at >= x.n) continue;
    load_p<P>(x, step.table.master, at, e[k].p);
    load<P>(x.g, at, e[k].g);
    load_codes(books.m, m_scale, x.m, at, e[k].m);
    load_codes(books.v, v_scale, x.v, at, e[k].v);
    step.leave_g<P>(x, at, e[k].g);
  }
  float m_largest = 0.0f, v_largest = 0.0f;
#pragma unroll
  for (int k = 0; k < G; ++k) {
    step.update<false>(e[k]);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      m_largest = MagnitudeOp{}(m_largest, fabsf(e[k].m[j]));
      v_largest = MagnitudeOp{}(v_largest, fabsf(e[k].v[j]));
    }
  }
  m_scale = warp_reduce<kWarpSize>(m_largest, MagnitudeOp{});
  v_scale = warp_reduce<kWarpSize>(v_largest, MagnitudeOp{});
  const Shares m_shares(m_scale), v_shares(v_scale);
#pragma unroll
  for (int k = 0; k < G; ++k) {
    const int64_t at = i + k * kWarpSize * N;
    if (N == 1 && at >= x.n) continue;
    step.keep_p<P>(x, at, e[k].p);
    store_codes(books.m, m_shares, x.m, at, e[k].m);
    store_codes(books.v, v_shares, x.v, at, e[k].v);
  }
  if (lane == 0) {  // addresses read late: kept from above they would spill
    step.x.m_scale[block] = m_scale;
    step.x.v_scale[block] = v_scale;
  }
}

template <class P>
__global__ __launch_bounds__(kThreads, kResident<kPerLane>) void update_codes_kernel(
    const __grid_constant__ Table table) {
  if (table.skipped()) return;
  __shared__ Codebooks books;
  books.m.make(int(threadIdx.x));
  books.v.make(int(threadIdx.x));
  __syncthreads();
  const Share share = share_of<kCodesChunk>(table.chunks, int(blockIdx.x));
  const Step step(table, table.chunks.parameters[share.parameter]);
  const bool aligned = vectorizable(step.x);
  const int warp = int(threadIdx.x) / kWarpSize;
  for (int64_t i = share.begin + warp * kBlock; i < share.end; i += kThreads * kPerLane) {
    if (aligned && i + kBlock <= step.x.n) {
      update_block<P, kGroup<P>>(step, books, i);
    } else {
      update_block<P, 1>(step, books, i);
    }
  }
}

}  // namespace bigkern::adam::cuda
