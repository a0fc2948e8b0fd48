// Attention, backward: the gradient of q.
//
//   dq = scale * ds k
//
// A block owns ROWS queries of one head and goes through the keys that they see.
//
//   shared     q, do [ROWS, D]    k, v [STREAMED, D], STAGES of each
//   registers, of each warp       s, p, ds [16, STREAMED] fp32    dq [16, COLUMNS] fp32
//
//   for each tile of keys:        s = q k^T    do v^T    dq += ds k
//
// Source: Dao, FlashAttention-2 (2023), algorithm 2, with the loops of dq's half the other way
// round.
#include "attention/backward.cuh"

namespace bigkern::attention::cuda {
namespace {

template <class T, int D>
using Tile = BackwardTile<T, D, false>;

template <class T, int D, bool MASKED>
__global__ void __launch_bounds__(Tile<T, D>::THREADS, 1)
    dq_kernel(const __grid_constant__ Backward call, int diagonal) {
  using Tile = Tile<T, D>;
  constexpr int ROWS = Tile::ROWS, STREAMED = Tile::STREAMED, THREADS = Tile::THREADS;
  constexpr int COLUMNS = Tile::COLUMNS;
  T* const q_tile = dynamic_smem<T>();
  T* const do_tile = q_tile + Tile::kTile;
  T* const k_tiles = do_tile + Tile::kTile;
  T* const v_tiles = k_tiles + Tile::STAGES * Tile::kStreamed;
  const int strip = warp() / Tile::SPLIT * 16, column0 = warp() % Tile::SPLIT * COLUMNS;
  T* const q_strip = q_tile + strip * kPitch<T, D>;
  T* const do_strip = do_tile + strip * kPitch<T, D>;

  // The last queries come first: with a causal rule theirs is the most work.
  const Shape& shape = call.shape;
  const int blocks = int(ceil_div(shape.Sq, ROWS)), Hq = int(shape.Hq);
  const int b = blockIdx.x / blocks / Hq, h = blockIdx.x / blocks % Hq;
  const int h_kv = h / (Hq / int(shape.Hkv));
  const int i0 = (blocks - 1 - int(blockIdx.x % blocks)) * ROWS, i_strip = i0 + strip;
  const int j_end = min(int(shape.Sk), i0 + ROWS + diagonal);
  const int steps = max(0, int(ceil_div(j_end, STREAMED)));

  const auto load_step = [&](int step) {
    if (step < steps) {
      const int stage = step % Tile::STAGES;
      load_tile<STREAMED, D, THREADS>(k_tiles + stage * Tile::kStreamed,
                                      rows_of<const T>(call.k, b, h_kv, shape.Sk, shape.D),
                                      step * STREAMED);
      load_tile<STREAMED, D, THREADS>(v_tiles + stage * Tile::kStreamed,
                                      rows_of<const T>(call.v, b, h_kv, shape.Sk, shape.Dv),
                                      step * STREAMED);
    }
    ptx::cp_async_commit();
  };

  const Scores<T, MASKED> scores(shape, diagonal, b, h);
  const RowStatistics statistics = statistics_of(call, b, h);
  const float lse[2] = {statistics.lse[i_strip + row_of(0)], statistics.lse[i_strip + row_of(2)]};
  const float delta[2] = {statistics.delta[i_strip + row_of(0)],
                          statistics.delta[i_strip + row_of(2)]};
  float dq[COLUMNS / 8][4] = {};
  load_tile<ROWS, D, THREADS>(q_tile, rows_of<const T>(call.q, b, h, shape.Sq, shape.D), i0);
  load_tile<ROWS, D, THREADS>(do_tile, rows_of<const T>(call.dout, b, h, shape.Sq, shape.Dv), i0);
  for (int step = 0; step < Tile::STAGES; ++step) load_step(step);
  for (int step = 0; step < steps; ++step) {
    const int j0 = step * STREAMED;
    const T* const k_tile = k_tiles + step % Tile::STAGES * Tile::kStreamed;
    const T* const v_tile = v_tiles + step % Tile::STAGES * Tile::kStreamed;
    ptx::cp_async_wait<Tile::STAGES - 1>();
    __syncthreads();  // k and v of this step are here

    float s[STREAMED / 8][4], ds[STREAMED / 8][4];
    dot_rows<STREAMED, D>(s, q_strip, k_tile);
    to_scores<false>(s, scores, scores.partial(i_strip, j0 + STREAMED - 1), i_strip, j0);
    dot_rows<STREAMED, D>(ds, do_strip, v_tile);
#pragma unroll
    for (int n = 0; n < STREAMED / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) to_p_and_ds<T>(s[n][e], ds[n][e], lse[e / 2], delta[e / 2]);
    }
    accumulate<STREAMED, COLUMNS, D>(dq, ds, k_tile + column0);
    __syncthreads();  // every warp is done with this stage
    load_step(step + Tile::STAGES);
  }

  ptx::cp_async_wait<0>();
  __syncthreads();  // even without keys q was on its way, to where dq goes now
  store_strip<D, COLUMNS>(rows_of<T>(call.dq, b, h, shape.Sq, shape.D), i_strip, column0, dq,
                          {shape.scale, shape.scale}, q_strip);
}

template <class T, int D, bool MASKED>
constexpr Kernel<Backward> instance(const char* name) {
  using Tile = Tile<T, D>;
  return {name,       DtypeOf<T>::value, D,         MASKED, dq_kernel<T, D, MASKED>,
          Tile::ROWS, Tile::THREADS,     Tile::SMEM};
}

const Kernel<Backward> kTable[] = {
    instance<bf16, 64, false>("attention dq bf16 64"),
    instance<bf16, 64, true>("attention dq bf16 64 masked"),
    instance<bf16, 128, false>("attention dq bf16 128"),
    instance<bf16, 128, true>("attention dq bf16 128 masked"),
    instance<bf16, 256, false>("attention dq bf16 256"),
    instance<bf16, 256, true>("attention dq bf16 256 masked"),
    instance<fp16, 64, false>("attention dq fp16 64"),
    instance<fp16, 64, true>("attention dq fp16 64 masked"),
    instance<fp16, 128, false>("attention dq fp16 128"),
    instance<fp16, 128, true>("attention dq fp16 128 masked"),
    instance<fp16, 256, false>("attention dq fp16 256"),
    instance<fp16, 256, true>("attention dq fp16 256 masked"),
    instance<float, 64, false>("attention dq fp32 64"),
    instance<float, 64, true>("attention dq fp32 64 masked"),
    instance<float, 128, false>("attention dq fp32 128"),
    instance<float, 128, true>("attention dq fp32 128 masked"),
    instance<float, 256, false>("attention dq fp32 256"),
    instance<float, 256, true>("attention dq fp32 256 masked"),
};

}  // namespace

int launch_dq(const Backward& call, void* stream) {
  return launch_from(kTable, call, call.shape.Sq, call.shape.B * call.shape.Hq, stream);
}

int dq_kernels(KernelInfo* out, int capacity) { return list(kTable, out, capacity); }

}  // namespace bigkern::attention::cuda
