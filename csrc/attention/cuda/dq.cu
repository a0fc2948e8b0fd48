// Attention, backward: the gradient of q.
//
//   dq = scale dx k
//
// A block owns ROWS queries of one head and goes through the keys that they see.
//
//   shared     q, do [ROWS, D]    k, v [STREAMED, D], STAGES of each
//   registers, of each warp       s, p, dx [16, STREAMED] fp32    dq [16, COLUMNS] fp32
//
//   for each tile of keys:        s = q k^T    do v^T    dq += dx k
//
// Source: Dao, FlashAttention-2 (2023), algorithm 2, with the loops of dq's half the other way
// round.
#include "attention/cuda/backward.cuh"

namespace bigkern::attention::cuda {
namespace {

template <class T, int D>
using Tile = BackwardTile<T, D, false>;

template <class T, int D, bool GENERAL>
__global__ void __launch_bounds__(Tile<T, D>::THREADS, GENERAL ? 1 : Tile<T, D>::BLOCKS)
    dq_kernel(const __grid_constant__ Backward call) {
  using Tile = Tile<T, D>;
  constexpr int ROWS = Tile::ROWS, STREAMED = Tile::STREAMED, THREADS = Tile::THREADS;
  constexpr int COLUMNS = Tile::COLUMNS;
  T* const q_tile = dynamic_smem<T>();
  T* const do_tile = q_tile + Tile::kTile;
  T* const k_tiles = do_tile + Tile::kTile;
  T* const v_tiles = k_tiles + Tile::STAGES * Tile::kStreamed;
  const int own_rows = warp() / Tile::SPLIT * 16, column0 = warp() % Tile::SPLIT * COLUMNS;
  T* const q_strip = q_tile + own_rows * kPitch<T, D>;
  T* const do_strip = do_tile + own_rows * kPitch<T, D>;

  // The last queries come first: with a causal rule theirs is the most work.
  const Shape& shape = call.shape;
  const int blocks = int(ceil_div(shape.Sq, ROWS)), Hq = int(shape.Hq);
  const int b = blockIdx.x / blocks / Hq, h = blockIdx.x / blocks % Hq;
  const int h_kv = h / (Hq / int(shape.Hkv));
  const int i0 = (blocks - 1 - int(blockIdx.x % blocks)) * ROWS;
  const Window window(shape, b);
  if (i0 >= window.Sq) return;  // a sequence shorter than the longest
  const Range keys = window.keys_of(i0, i0 + ROWS);
  const int steps = max(0, int(ceil_div(keys.end - keys.begin, STREAMED)));

  const auto load_step = [&](int step) {
    if (step < steps) {
      const int j0 = keys.begin + step * STREAMED, stage = step % Tile::STAGES;
      const auto k = rows_of<const T>(call.k, b, h_kv, window.k_begin, window.Sk, shape.D);
      const auto v = rows_of<const T>(call.v, b, h_kv, window.k_begin, window.Sk, shape.Dv);
      load_tile<STREAMED, D, THREADS>(k_tiles + stage * Tile::kStreamed, k, j0);
      load_tile<STREAMED, D, THREADS>(v_tiles + stage * Tile::kStreamed, v, j0);
    }
    ptx::cp_async_commit();
  };

  const Strip<false> strip(window, i0 + own_rows);
  const Scores<T, GENERAL> scores{shape, b, h};
  const auto statistics = statistics_of<const float>(call, window, b, h);
  const Terms terms = terms_of_rows(statistics, strip.row0);
  float dq[COLUMNS / 8][4] = {};
  const auto q = rows_of<const T>(call.q, b, h, window.q_begin, window.Sq, shape.D);
  const auto dout = rows_of<const T>(call.dout, b, h, window.q_begin, window.Sq, shape.Dv);
  load_tile<ROWS, D, THREADS>(q_tile, q, i0);
  load_tile<ROWS, D, THREADS>(do_tile, dout, i0);
  for (int step = 0; step < Tile::STAGES; ++step) load_step(step);
  for (int step = 0; step < steps; ++step) {
    const T* const k_tile = k_tiles + step % Tile::STAGES * Tile::kStreamed;
    const T* const v_tile = v_tiles + step % Tile::STAGES * Tile::kStreamed;
    ptx::cp_async_wait<Tile::STAGES - 1>();
    __syncthreads();  // k and v of this step are here

    float s[STREAMED / 8][4], dx[STREAMED / 8][4];
    dot_rows<STREAMED, D>(s, q_strip, k_tile);
    dot_rows<STREAMED, D>(dx, do_strip, v_tile);
    to_gradients(s, dx, scores, strip, keys.begin + step * STREAMED, [&](int) { return terms; });
    accumulate<STREAMED, COLUMNS, D>(dq, dx, k_tile + column0);
    __syncthreads();  // every warp is done with this stage
    load_step(step + Tile::STAGES);
  }

  ptx::cp_async_wait<0>();
  __syncthreads();  // even without keys q was on its way, to where dq goes now
  store_strip<D, COLUMNS>(rows_of<T>(call.dq, b, h, window.q_begin, window.Sq, shape.D), strip.row0,
                          column0, dq, {shape.scale, shape.scale}, q_strip);
}

template <class T, int D, bool GENERAL>
constexpr Kernel<Backward> instance(const char* name) {
  using Tile = Tile<T, D>;
  return {name,       DtypeOf<T>::value, D,         GENERAL, dq_kernel<T, D, GENERAL>,
          Tile::ROWS, Tile::THREADS,     Tile::SMEM};
}

const Kernel<Backward> kTable[] = {
    instance<bf16, 64, false>("attention dq bf16 64"),
    instance<bf16, 64, true>("attention dq bf16 64 general"),
    instance<bf16, 128, false>("attention dq bf16 128"),
    instance<bf16, 128, true>("attention dq bf16 128 general"),
    instance<bf16, 256, false>("attention dq bf16 256"),
    instance<bf16, 256, true>("attention dq bf16 256 general"),
    instance<fp16, 64, false>("attention dq fp16 64"),
    instance<fp16, 64, true>("attention dq fp16 64 general"),
    instance<fp16, 128, false>("attention dq fp16 128"),
    instance<fp16, 128, true>("attention dq fp16 128 general"),
    instance<fp16, 256, false>("attention dq fp16 256"),
    instance<fp16, 256, true>("attention dq fp16 256 general"),
    instance<float, 64, false>("attention dq fp32 64"),
    instance<float, 64, true>("attention dq fp32 64 general"),
    instance<float, 128, false>("attention dq fp32 128"),
    instance<float, 128, true>("attention dq fp32 128 general"),
    instance<float, 256, false>("attention dq fp32 256"),
    instance<float, 256, true>("attention dq fp32 256 general"),
};

}  // namespace

int launch_dq(const Backward& call, void* stream) {
  return launch_from(kTable, call, call.shape.Sq, call.shape.B * call.shape.Hq, stream);
}

int dq_kernels(KernelInfo* out, int capacity) { return list(kTable, out, capacity); }

}  // namespace bigkern::attention::cuda
