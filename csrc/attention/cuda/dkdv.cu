// Attention, backward: the gradients of k and v.
//
//   dv = (dropped p)^T do     dk = scale dx^T q     summed over the heads that share the key head
//
// A block owns ROWS keys of one key head and goes through the queries that see them, head after
// head of the group. Everything is computed transposed, with a row for each key: so p^T and dx^T
// leave the first two products in the very registers that the last two want them in.
//
//   shared     k, v [ROWS, D]    q, do [STREAMED, D], STAGES of each
//   registers, of each warp      s^T, p^T, dx^T [16, STREAMED] fp32    dk, dv [16, COLUMNS] fp32
//
//   for each tile of queries:    s^T = k q^T    do v^T transposed    dv += p^T do    dk += dx^T q
//
// Source: Dao, FlashAttention-2 (2023), algorithm 2.
#include "attention/cuda/backward.cuh"

namespace bigkern::attention::cuda {
namespace {

template <class T, int D>
using Tile = BackwardTile<T, D, true>;

template <class T, int D, bool GENERAL>
__global__ void __launch_bounds__(Tile<T, D>::THREADS, 1)
    dkdv_kernel(const __grid_constant__ Backward call) {
  using Tile = Tile<T, D>;
  constexpr int ROWS = Tile::ROWS, STREAMED = Tile::STREAMED, THREADS = Tile::THREADS;
  constexpr int COLUMNS = Tile::COLUMNS;
  T* const k_tile = dynamic_smem<T>();
  T* const v_tile = k_tile + Tile::kTile;
  T* const q_tiles = v_tile + Tile::kTile;
  T* const do_tiles = q_tiles + Tile::STAGES * Tile::kStreamed;
  const int own_rows = warp() / Tile::SPLIT * 16, column0 = warp() % Tile::SPLIT * COLUMNS;
  T* const k_strip = k_tile + own_rows * kPitch<T, D>;
  T* const v_strip = v_tile + own_rows * kPitch<T, D>;

  const Shape& shape = call.shape;
  const int blocks = int(ceil_div(shape.Sk, ROWS)), Hkv = int(shape.Hkv);
  const int b = blockIdx.x / blocks / Hkv, h_kv = blockIdx.x / blocks % Hkv;
  const int j0 = blockIdx.x % blocks * ROWS;
  const Window window(shape, b);
  if (j0 >= window.Sk) return;  // a sequence shorter than the longest
  const int group = int(shape.Hq) / Hkv;
  const Range queries = window.queries_of(j0, j0 + ROWS);
  const int i_first = queries.begin / STREAMED * STREAMED;  // where vectors of statistics begin
  const int tiles = max(0, int(ceil_div(queries.end - i_first, STREAMED)));
  const int steps = tiles * group;
  const Strip<true> strip(window, j0 + own_rows);

  const auto load_step = [&](int step) {
    if (step < steps) {
      const int h = h_kv * group + step / tiles;
      const int i0 = i_first + step % tiles * STREAMED, stage = step % Tile::STAGES;
      const auto q = rows_of<const T>(call.q, b, h, window.q_begin, window.Sq, shape.D);
      const auto dout = rows_of<const T>(call.dout, b, h, window.q_begin, window.Sq, shape.Dv);
      load_tile<STREAMED, D, THREADS>(q_tiles + stage * Tile::kStreamed, q, i0);
      load_tile<STREAMED, D, THREADS>(do_tiles + stage * Tile::kStreamed, dout, i0);
    }
    ptx::cp_async_commit();
  };

  float dk[COLUMNS / 8][4] = {}, dv[COLUMNS / 8][4] = {};
  const auto k = rows_of<const T>(call.k, b, h_kv, window.k_begin, window.Sk, shape.D);
  const auto v = rows_of<const T>(call.v, b, h_kv, window.k_begin, window.Sk, shape.Dv);
  load_tile<ROWS, D, THREADS>(k_tile, k, j0);
  load_tile<ROWS, D, THREADS>(v_tile, v, j0);
  for (int step = 0; step < Tile::STAGES; ++step) load_step(step);
  for (int step = 0; step < steps; ++step) {
    const int h = h_kv * group + step / tiles, i0 = i_first + step % tiles * STREAMED;
    const T* const q_tile = q_tiles + step % Tile::STAGES * Tile::kStreamed;
    const T* const do_tile = do_tiles + step % Tile::STAGES * Tile::kStreamed;
    const Scores<T, GENERAL> scores{shape, b, h};
    const auto statistics = statistics_of<const float>(call, window, b, h);
    ptx::cp_async_wait<Tile::STAGES - 1>();
    __syncthreads();  // q and do of this step are here

    float s[STREAMED / 8][4], dx[STREAMED / 8][4];
    dot_rows<STREAMED, D>(s, k_strip, q_tile);
    dot_rows<STREAMED, D>(dx, v_strip, do_tile);
    to_gradients(s, dx, scores, strip, i0,
                 [&](int n) { return terms_of_columns(statistics, i0 + n * 8); });
    accumulate<STREAMED, COLUMNS, D>(dv, s, do_tile + column0);
    accumulate<STREAMED, COLUMNS, D>(dk, dx, q_tile + column0);
    __syncthreads();  // every warp is done with this stage
    load_step(step + Tile::STAGES);
  }

  ptx::cp_async_wait<0>();
  __syncthreads();  // even without queries k and v were on their way, to where dk and dv go now
  const float dv_scale = GENERAL ? dropout_scale(shape) : 1.0f;
  store_strip<D, COLUMNS>(rows_of<T>(call.dk, b, h_kv, window.k_begin, window.Sk, shape.D),
                          strip.row0, column0, dk, {shape.scale, shape.scale}, k_strip);
  store_strip<D, COLUMNS>(rows_of<T>(call.dv, b, h_kv, window.k_begin, window.Sk, shape.Dv),
                          strip.row0, column0, dv, {dv_scale, dv_scale}, v_strip);
}

template <class T, int D, bool GENERAL>
constexpr Kernel<Backward> instance(const char* name) {
  using Tile = Tile<T, D>;
  return {name,       DtypeOf<T>::value, D,         GENERAL, dkdv_kernel<T, D, GENERAL>,
          Tile::ROWS, Tile::THREADS,     Tile::SMEM};
}

const Kernel<Backward> kTable[] = {
    instance<bf16, 64, false>("attention dkdv bf16 64"),
    instance<bf16, 64, true>("attention dkdv bf16 64 general"),
    instance<bf16, 128, false>("attention dkdv bf16 128"),
    instance<bf16, 128, true>("attention dkdv bf16 128 general"),
    instance<bf16, 256, false>("attention dkdv bf16 256"),
    instance<bf16, 256, true>("attention dkdv bf16 256 general"),
    instance<fp16, 64, false>("attention dkdv fp16 64"),
    instance<fp16, 64, true>("attention dkdv fp16 64 general"),
    instance<fp16, 128, false>("attention dkdv fp16 128"),
    instance<fp16, 128, true>("attention dkdv fp16 128 general"),
    instance<fp16, 256, false>("attention dkdv fp16 256"),
    instance<fp16, 256, true>("attention dkdv fp16 256 general"),
    instance<float, 64, false>("attention dkdv fp32 64"),
    instance<float, 64, true>("attention dkdv fp32 64 general"),
    instance<float, 128, false>("attention dkdv fp32 128"),
    instance<float, 128, true>("attention dkdv fp32 128 general"),
    instance<float, 256, false>("attention dkdv fp32 256"),
    instance<float, 256, true>("attention dkdv fp32 256 general"),
};

}  // namespace

int launch_dkdv(const Backward& call, void* stream) {
  return launch_from(kTable, call, call.shape.Sk, call.shape.B * call.shape.Hkv, stream);
}

int dkdv_kernels(KernelInfo* out, int capacity) { return list(kTable, out, capacity); }

}  // namespace bigkern::attention::cuda
