// Attention, forward: FlashAttention-2 for sm_80 and later.
//
//   s = cap(scale q k^T) + bias + slopes, -inf where window or mask forbid
//   lse = log (sum exp s + exp sink)        p = exp(s - lse)        o = (dropped p) v
//
// The scores of one block of queries are computed a tile of keys at a time and never leave the
// registers. Each warp owns 16 queries. What has been seen of a row is summed up in three things:
// the largest score m, the sum l of exp(score - m), and the sum of exp(score - m) v. A larger score
// in a later tile rescales the two sums (online softmax).
//
//   shared     q [ROWS, D]    k [KEYS, D]    v [KEYS, D]
//   registers, of each warp    s, p [16, KEYS] fp32    o [16, COLUMNS] fp32    m, l [16]
//
//   for each tile of keys      k arrived | v travels  : s = q k^T
//   that some query sees:      v arrived | k travels  : m, l, p, o = o * rescale + p v
//
// Source: Dao, FlashAttention-2 (2023); Milakov and Gimelshein, online softmax (2018).
#include "attention/cuda/product.cuh"
#include "attention/cuda/softmax.cuh"

namespace bigkern::attention::cuda {
namespace {

// A block has ROWS queries and goes through the keys KEYS at a time, in at most 99 KiB, so that
// every GPU from sm_80 on can run it. Each warp owns 16 queries and COLUMNS columns of o: as many
// as there are registers for. Where that is not all, SPLIT warps do the same queries, and compute
// the same p.
template <class T, int D>
struct Tile {
  static constexpr int kRowBytes = D * int(sizeof(T));
  static constexpr int ROWS = kRowBytes <= 512 ? 128 : 64;
  static constexpr int KEYS = sizeof(T) == 4 ? (D == 64 ? 32 : 16) : D == 256 ? 32 : 64;
  static constexpr int SPLIT = kRowBytes > 512 ? kRowBytes / 512 : 1;
  static constexpr int COLUMNS = D / SPLIT;
  static constexpr int THREADS = ROWS / 16 * SPLIT * kWarpSize;
  static constexpr int BLOCKS = sizeof(T) == 2 && D <= 128 ? 2 : 1;  // on one multiprocessor
  static constexpr size_t SMEM = size_t(ROWS + 2 * KEYS) * kPitch<T, D> * sizeof(T);
};

// Turns the products q k^T of a strip into scores.
template <int N, class T, bool GENERAL>
__device__ __forceinline__ void to_scores(float (&s)[N][4], const Scores<T, GENERAL>& scores,
                                          const Strip<false>& strip, int column0) {
  const auto each = [&](auto f) { for_each_score(s, strip, column0, f); };
  each([&](float& x, int, int) { x *= scores.scale(); });
  if (scores.capped()) each([&](float& x, int, int) { cap<T>(x, scores.shape.softcap); });
  restrict_scores(s, scores, strip, column0);
}

// Stores o and lse of a strip. The dropped p are scaled here, all at once.
template <class T, int D, int COLUMNS>
__device__ __forceinline__ void store_results(const Forward& call, int b, int h, int row0,
                                              int column0, const Softmax& row,
                                              const float (&acc)[COLUMNS / 8][4], T* strip) {
  const Window window(call.shape, b);
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float l = warp_sum<4>(row.l[half]);
    const bool empty = row.m[half] == -INFINITY;
    inverse[half] = empty ? 0.0f : dropout_scale(call.shape) / l;
    const int i = row0 + row_of(2 * half);
    if (i < window.Sq && lane() % 4 == 0 && column0 == 0) {
      call.lse.data[b * call.lse.batch + h * call.lse.head + window.q_begin + i] =
          empty ? -INFINITY : row.m[half] / kUnit<T> + logf(l);
    }
  }
  const auto o = rows_of<T>(call.o, b, h, window.q_begin, window.Sq, call.shape.Dv);
  store_strip<D, COLUMNS>(o, row0, column0, acc, inverse, strip);
}

template <class T, int D, bool GENERAL>
__global__ void __launch_bounds__(Tile<T, D>::THREADS, GENERAL ? 1 : Tile<T, D>::BLOCKS)
    forward_kernel(const __grid_constant__ Forward call) {
  constexpr int ROWS = Tile<T, D>::ROWS, KEYS = Tile<T, D>::KEYS, THREADS = Tile<T, D>::THREADS;
  constexpr int SPLIT = Tile<T, D>::SPLIT, COLUMNS = Tile<T, D>::COLUMNS;
  T* const q_tile = dynamic_smem<T>();
  T* const k_tile = q_tile + ROWS * kPitch<T, D>;
  T* const v_tile = k_tile + KEYS * kPitch<T, D>;
  const int own_rows = warp() / SPLIT * 16, column0 = warp() % SPLIT * COLUMNS;
  T* const q_strip = q_tile + own_rows * kPitch<T, D>;

  // The last queries come first: with a causal rule theirs is the most work.
  const Shape& shape = call.shape;
  const int blocks = int(ceil_div(shape.Sq, ROWS));
  const int Hq = int(shape.Hq), b = blockIdx.x / blocks / Hq, h = blockIdx.x / blocks % Hq;
  const int h_kv = h / (Hq / int(shape.Hkv));
  const int i0 = (blocks - 1 - int(blockIdx.x % blocks)) * ROWS;
  const Window window(shape, b);
  if (i0 >= window.Sq) return;  // a sequence shorter than the longest
  const auto q = rows_of<const T>(call.q, b, h, window.q_begin, window.Sq, shape.D);
  const auto k = rows_of<const T>(call.k, b, h_kv, window.k_begin, window.Sk, shape.D);
  const auto v = rows_of<const T>(call.v, b, h_kv, window.k_begin, window.Sk, shape.Dv);
  const Range keys = window.keys_of(i0, i0 + ROWS);
  const Strip<false> strip(window, i0 + own_rows);
  const Scores<T, GENERAL> scores{shape, b, h};

  float acc[COLUMNS / 8][4] = {};
  const float sink = value_of(shape.sinks, b, h, -INFINITY) * kUnit<T>;
  Softmax row(sink, sink);
  load_tile<ROWS, D, THREADS>(q_tile, q, i0);
  if (keys.begin < keys.end) load_tile<KEYS, D, THREADS>(k_tile, k, keys.begin);
  ptx::cp_async_commit();
  for (int j0 = keys.begin; j0 < keys.end; j0 += KEYS) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // k is here, and every warp is done with v
    load_tile<KEYS, D, THREADS>(v_tile, v, j0);
    ptx::cp_async_commit();
    float s[KEYS / 8][4];
    dot_rows<KEYS, D>(s, q_strip, k_tile);

    ptx::cp_async_wait<0>();
    __syncthreads();  // v is here, and every warp is done with k
    if (j0 + KEYS < keys.end) load_tile<KEYS, D, THREADS>(k_tile, k, j0 + KEYS);
    ptx::cp_async_commit();
    to_scores(s, scores, strip, j0);
    float rescale[2];
    softmax_step<T>(row, s, rescale);
    if constexpr (GENERAL) {
      if (scores.dropped()) {
        for_each_draw(s, scores, strip, j0, [](float& p, bool keep) { p = keep ? p : 0.0f; });
      }
    }
    scale_rows(acc, rescale);
    accumulate<KEYS, COLUMNS, D>(acc, s, v_tile + column0);
  }

  ptx::cp_async_wait<0>();
  __syncthreads();  // even without keys q was on its way, to where o goes now
  store_results<T, D, COLUMNS>(call, b, h, strip.row0, column0, row, acc, q_strip);
}

template <class T, int D, bool GENERAL>
constexpr Kernel<Forward> instance(const char* name) {
  using Tile = Tile<T, D>;
  return {name,       DtypeOf<T>::value, D,         GENERAL, forward_kernel<T, D, GENERAL>,
          Tile::ROWS, Tile::THREADS,     Tile::SMEM};
}

const Kernel<Forward> kTable[] = {
    instance<bf16, 64, false>("attention forward bf16 64"),
    instance<bf16, 64, true>("attention forward bf16 64 general"),
    instance<bf16, 128, false>("attention forward bf16 128"),
    instance<bf16, 128, true>("attention forward bf16 128 general"),
    instance<bf16, 256, false>("attention forward bf16 256"),
    instance<bf16, 256, true>("attention forward bf16 256 general"),
    instance<fp16, 64, false>("attention forward fp16 64"),
    instance<fp16, 64, true>("attention forward fp16 64 general"),
    instance<fp16, 128, false>("attention forward fp16 128"),
    instance<fp16, 128, true>("attention forward fp16 128 general"),
    instance<fp16, 256, false>("attention forward fp16 256"),
    instance<fp16, 256, true>("attention forward fp16 256 general"),
    instance<float, 64, false>("attention forward fp32 64"),
    instance<float, 64, true>("attention forward fp32 64 general"),
    instance<float, 128, false>("attention forward fp32 128"),
    instance<float, 128, true>("attention forward fp32 128 general"),
    instance<float, 256, false>("attention forward fp32 256"),
    instance<float, 256, true>("attention forward fp32 256 general"),
};

}  // namespace

size_t forward_workspace(const Shape&) { return 0; }

int forward(const Forward& call, void* stream) {
  return launch_from(kTable, call, call.shape.Sq, call.shape.B * call.shape.Hq, stream);
}

int forward_kernels(KernelInfo* out, int capacity) { return list(kTable, out, capacity); }

}  // namespace bigkern::attention::cuda
