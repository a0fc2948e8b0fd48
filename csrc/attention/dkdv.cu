// Attention, backward: the gradients of k and v.
//
//   dv = p^T do      dk = scale * ds^T q      summed over the query heads that share the key head
//
// A block owns ROWS keys of one key head and goes through the queries that see them, head after
// head of the group. Everything is computed transposed, with a row for each key: so p^T and ds^T
// leave the first two products in the very registers that the last two want them in.
//
//   shared     k, v [ROWS, D]    q, do [STREAMED, D], STAGES of each
//   registers, of each warp      s^T, p^T, ds^T [16, STREAMED] fp32    dk, dv [16, COLUMNS] fp32
//
//   for each tile of queries:    s^T = k q^T    do v^T transposed    dv += p^T do    dk += ds^T q
//
// Source: Dao, FlashAttention-2 (2023), algorithm 2.
#include "attention/backward.cuh"

namespace bigkern::attention::cuda {
namespace {

template <class T, int D>
using Tile = BackwardTile<T, D, true>;

template <class T, int D, bool MASKED>
__global__ void __launch_bounds__(Tile<T, D>::THREADS, 1)
    dkdv_kernel(const __grid_constant__ Backward call, int diagonal) {
  using Tile = Tile<T, D>;
  constexpr int ROWS = Tile::ROWS, STREAMED = Tile::STREAMED, THREADS = Tile::THREADS;
  constexpr int COLUMNS = Tile::COLUMNS;
  T* const k_tile = dynamic_smem<T>();
  T* const v_tile = k_tile + Tile::kTile;
  T* const q_tiles = v_tile + Tile::kTile;
  T* const do_tiles = q_tiles + Tile::STAGES * Tile::kStreamed;
  const int strip = warp() / Tile::SPLIT * 16, column0 = warp() % Tile::SPLIT * COLUMNS;
  T* const k_strip = k_tile + strip * kPitch<T, D>;
  T* const v_strip = v_tile + strip * kPitch<T, D>;

  const Shape& shape = call.shape;
  const int blocks = int(ceil_div(shape.Sk, ROWS)), Hkv = int(shape.Hkv);
  const int b = blockIdx.x / blocks / Hkv, h_kv = blockIdx.x / blocks % Hkv;
  const int j0 = blockIdx.x % blocks * ROWS, j_strip = j0 + strip;
  const int group = int(shape.Hq) / Hkv;
  const int first_tile = max(0, j0 - diagonal) / STREAMED;  // no query before it sees these keys
  const int tiles = max(0, int(ceil_div(shape.Sq, STREAMED)) - first_tile);
  const int steps = tiles * group;

  const auto load_step = [&](int step) {
    if (step < steps) {
      const int h = h_kv * group + step / tiles;
      const int i0 = (first_tile + step % tiles) * STREAMED, stage = step % Tile::STAGES;
      load_tile<STREAMED, D, THREADS>(q_tiles + stage * Tile::kStreamed,
                                      rows_of<const T>(call.q, b, h, shape.Sq, shape.D), i0);
      load_tile<STREAMED, D, THREADS>(do_tiles + stage * Tile::kStreamed,
                                      rows_of<const T>(call.dout, b, h, shape.Sq, shape.Dv), i0);
    }
    ptx::cp_async_commit();
  };

  float dk[COLUMNS / 8][4] = {}, dv[COLUMNS / 8][4] = {};
  load_tile<ROWS, D, THREADS>(k_tile, rows_of<const T>(call.k, b, h_kv, shape.Sk, shape.D), j0);
  load_tile<ROWS, D, THREADS>(v_tile, rows_of<const T>(call.v, b, h_kv, shape.Sk, shape.Dv), j0);
  for (int step = 0; step < Tile::STAGES; ++step) load_step(step);
  for (int step = 0; step < steps; ++step) {
    const int h = h_kv * group + step / tiles, i0 = (first_tile + step % tiles) * STREAMED;
    const T* const q_tile = q_tiles + step % Tile::STAGES * Tile::kStreamed;
    const T* const do_tile = do_tiles + step % Tile::STAGES * Tile::kStreamed;
    const Scores<T, MASKED> scores(shape, diagonal, b, h);
    const RowStatistics statistics = statistics_of(call, b, h);
    ptx::cp_async_wait<Tile::STAGES - 1>();
    __syncthreads();  // q and do of this step are here

    float s[STREAMED / 8][4], ds[STREAMED / 8][4];
    dot_rows<STREAMED, D>(s, k_strip, q_tile);
    to_scores<true>(s, scores, scores.partial(i0, j_strip + 15), j_strip, i0);
    dot_rows<STREAMED, D>(ds, v_strip, do_tile);
#pragma unroll
    for (int n = 0; n < STREAMED / 8; ++n) {
      const int i = i0 + n * 8 + column_of(0);
      const Vec<float, 2> lse = load_vec<float, 2>(statistics.lse + i);
      const Vec<float, 2> delta = load_vec<float, 2>(statistics.delta + i);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        to_p_and_ds<T>(s[n][e], ds[n][e], lse.data[e % 2], delta.data[e % 2]);
    }
    accumulate<STREAMED, COLUMNS, D>(dv, s, do_tile + column0);
    accumulate<STREAMED, COLUMNS, D>(dk, ds, q_tile + column0);
    __syncthreads();  // every warp is done with this stage
    load_step(step + Tile::STAGES);
  }

  ptx::cp_async_wait<0>();
  __syncthreads();  // even without queries k and v were on their way, to where dk and dv go now
  store_strip<D, COLUMNS>(rows_of<T>(call.dk, b, h_kv, shape.Sk, shape.D), j_strip, column0, dk,
                          {shape.scale, shape.scale}, k_strip);
  store_strip<D, COLUMNS>(rows_of<T>(call.dv, b, h_kv, shape.Sk, shape.Dv), j_strip, column0, dv,
                          {1.0f, 1.0f}, v_strip);
}

template <class T, int D, bool MASKED>
constexpr Kernel<Backward> instance(const char* name) {
  using Tile = Tile<T, D>;
  return {name,       DtypeOf<T>::value, D,         MASKED, dkdv_kernel<T, D, MASKED>,
          Tile::ROWS, Tile::THREADS,     Tile::SMEM};
}

const Kernel<Backward> kTable[] = {
    instance<bf16, 64, false>("attention dkdv bf16 64"),
    instance<bf16, 64, true>("attention dkdv bf16 64 masked"),
    instance<bf16, 128, false>("attention dkdv bf16 128"),
    instance<bf16, 128, true>("attention dkdv bf16 128 masked"),
    instance<bf16, 256, false>("attention dkdv bf16 256"),
    instance<bf16, 256, true>("attention dkdv bf16 256 masked"),
    instance<fp16, 64, false>("attention dkdv fp16 64"),
    instance<fp16, 64, true>("attention dkdv fp16 64 masked"),
    instance<fp16, 128, false>("attention dkdv fp16 128"),
    instance<fp16, 128, true>("attention dkdv fp16 128 masked"),
    instance<fp16, 256, false>("attention dkdv fp16 256"),
    instance<fp16, 256, true>("attention dkdv fp16 256 masked"),
    instance<float, 64, false>("attention dkdv fp32 64"),
    instance<float, 64, true>("attention dkdv fp32 64 masked"),
    instance<float, 128, false>("attention dkdv fp32 128"),
    instance<float, 128, true>("attention dkdv fp32 128 masked"),
    instance<float, 256, false>("attention dkdv fp32 256"),
    instance<float, 256, true>("attention dkdv fp32 256 masked"),
};

}  // namespace

int launch_dkdv(const Backward& call, void* stream) {
  return launch_from(kTable, call, call.shape.Sk, call.shape.B * call.shape.Hkv, stream);
}

int dkdv_kernels(KernelInfo* out, int capacity) { return list(kTable, out, capacity); }

}  // namespace bigkern::attention::cuda
