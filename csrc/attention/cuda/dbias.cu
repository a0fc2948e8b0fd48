// Attention, backward: the gradient of the bias.
//
//   dbias = ds = p * (dropped (do v^T) - delta), summed over the dimensions bias is broadcast over
//
// A block owns a tile of the bias, and walks over all the tiles of the scores that the bias tile
// was added to: those of other batches and heads, and, where it has one row for all queries or one
// column for all keys, those beside it. So every entry has one owner, and sums are always added in
// the same order. Nothing is kept of dq's or dkdv's work: s and do v^T are computed once more.
//
//   shared     q, do [ROWS, D]    k, v [KEYS, D]         at the end, the sums [ROWS, KEYS] fp32
//   registers, of each warp       s, ds, sum [16, KEYS] fp32
//
//   for each tile walked over:    q k arrived | do v travel  : s = q k^T
//                                 do v arrived               : do v^T    sum += ds
#include "attention/cuda/backward.cuh"

namespace bigkern::attention::cuda {
namespace {

// One stage in at most 99 KiB: what hides the way from memory are the other blocks of the
// multiprocessor.
template <class T, int D>
struct Tile {
  static constexpr int kRowBytes = D * int(sizeof(T));
  static constexpr int ROWS = kRowBytes <= 512 ? 64 : 32;
  static constexpr int KEYS = kRowBytes <= 256 ? 64 : kRowBytes == 512 ? 32 : 16;
  static constexpr int THREADS = ROWS / 16 * kWarpSize;
  static constexpr size_t SMEM = size_t(2 * (ROWS + KEYS)) * kPitch<T, D> * sizeof(T);
  static constexpr int kSums = KEYS + 1;  // from one row of sums to the next: other banks
  static_assert(size_t(ROWS) * kSums * sizeof(float) <= SMEM, "the sums have no room");
};

// Numbers of batches, heads, tiles of queries and tiles of keys; or one of each.
struct Parts {
  int b, h, i, j;
  BIGKERN_HD int64_t product() const { return int64_t(b) * h * i * j; }
  BIGKERN_HD Parts at(int index) const {
    return {index / j / i / h, index / j / i % h, index / j % i, index % j};
  }
};

// Of each dimension, as many parts as there are blocks for, and as many as a block walks over.
struct Work {
  Parts owned, walked;
  BIGKERN_HD Work(const Shape& shape, const Broadcast<void*>& x, int rows, int keys) {
    const int B = int(shape.B), H = int(shape.Hq);
    const int i = int(ceil_div(shape.Sq, rows)), j = int(ceil_div(shape.Sk, keys));
    owned = {x.batch ? B : 1, x.head ? H : 1, x.row ? i : 1, x.column ? j : 1};
    walked = {x.batch ? 1 : B, x.head ? 1 : H, x.row ? 1 : i, x.column ? 1 : j};
  }
};

// Adds up a tile's sums over its columns, its rows, or both, where the bias has only one.
template <class Tile>
__device__ __forceinline__ void add_up(float* sums, bool columns, bool rows) {
  if (columns) {
    for (int r = threadIdx.x; r < Tile::ROWS; r += Tile::THREADS) {
      float sum = 0.0f;
      for (int c = 0; c < Tile::KEYS; ++c) sum += sums[r * Tile::kSums + c];
      sums[r * Tile::kSums] = sum;
    }
    __syncthreads();
  }
  if (rows) {
    for (int c = threadIdx.x; c < Tile::KEYS; c += Tile::THREADS) {
      float sum = 0.0f;
      for (int r = 0; r < Tile::ROWS; ++r) sum += sums[r * Tile::kSums + c];
      sums[c] = sum;
    }
    __syncthreads();
  }
}

// Writes what a block owns: entries of at most ROWS rows and KEYS columns.
template <class T, class Tile>
__device__ __forceinline__ void store_sums(const Backward& call, const Parts& own, float* sums) {
  const Broadcast<void*>& x = call.dbias;
  const int64_t i0 = own.i * Tile::ROWS, j0 = own.j * Tile::KEYS;
  const int rows = x.row ? int(min(int64_t(Tile::ROWS), call.shape.Sq - i0)) : 1;
  const int columns = x.column ? int(min(int64_t(Tile::KEYS), call.shape.Sk - j0)) : 1;
  T* const out =
      static_cast<T*>(x.data) + own.b * x.batch + own.h * x.head + i0 * x.row + j0 * x.column;
  add_up<Tile>(sums, x.column == 0, x.row == 0);
  for (int n = threadIdx.x; n < rows * columns; n += Tile::THREADS) {
    const int r = n / columns, c = n % columns;
    out[r * x.row + c * x.column] = from_float<T>(sums[r * Tile::kSums + c]);
  }
}

template <class T, int D>
__global__ void __launch_bounds__(Tile<T, D>::THREADS, 1)
    dbias_kernel(const __grid_constant__ Backward call) {
  using Tile = Tile<T, D>;
  constexpr int ROWS = Tile::ROWS, KEYS = Tile::KEYS, THREADS = Tile::THREADS;
  T* const q_tile = dynamic_smem<T>();
  T* const do_tile = q_tile + ROWS * kPitch<T, D>;
  T* const k_tile = do_tile + ROWS * kPitch<T, D>;
  T* const v_tile = k_tile + KEYS * kPitch<T, D>;
  const int own_rows = warp() * 16;

  const Shape& shape = call.shape;
  const Work work(shape, call.dbias, ROWS, KEYS);
  const Parts own = work.owned.at(blockIdx.x);
  const int steps = int(work.walked.product()), group = int(shape.Hq / shape.Hkv);
  const Window window(shape, 0);  // sequences are not packed: all are alike

  float sum[KEYS / 8][4] = {};
  for (int step = 0; step < steps; ++step) {
    const Parts walk = work.walked.at(step);
    const int b = own.b + walk.b, h = own.h + walk.h, h_kv = h / group;
    const int i0 = (own.i + walk.i) * ROWS, j0 = (own.j + walk.j) * KEYS;
    const Range keys = window.keys_of(i0, i0 + ROWS);
    if (j0 >= keys.end || j0 + KEYS <= keys.begin) continue;

    __syncthreads();  // every warp is done with the tiles before
    load_tile<ROWS, D, THREADS>(q_tile, rows_of<const T>(call.q, b, h, 0, window.Sq, shape.D), i0);
    load_tile<KEYS, D, THREADS>(k_tile, rows_of<const T>(call.k, b, h_kv, 0, window.Sk, shape.D),
                                j0);
    ptx::cp_async_commit();
    load_tile<ROWS, D, THREADS>(do_tile, rows_of<const T>(call.dout, b, h, 0, window.Sq, shape.Dv),
                                i0);
    load_tile<KEYS, D, THREADS>(v_tile, rows_of<const T>(call.v, b, h_kv, 0, window.Sk, shape.Dv),
                                j0);
    ptx::cp_async_commit();
    const Strip<false> strip(window, i0 + own_rows);
    const Scores<T, true> scores{shape, b, h};
    float s[KEYS / 8][4], ds[KEYS / 8][4];
    ptx::cp_async_wait<1>();
    __syncthreads();  // q and k are here
    dot_rows<KEYS, D>(s, q_tile + own_rows * kPitch<T, D>, k_tile);
    ptx::cp_async_wait<0>();
    __syncthreads();  // do and v are here
    dot_rows<KEYS, D>(ds, do_tile + own_rows * kPitch<T, D>, v_tile);
    const auto statistics = statistics_of<const float>(call, window, b, h);
    const Terms terms = terms_of_rows(statistics, strip.row0);
    to_gradients<true>(s, ds, scores, strip, j0, [&](int) { return terms; });
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[n][e] += ds[n][e];
    }
  }

  __syncthreads();  // every warp is done with the tiles, where the sums go now
  float* const sums = dynamic_smem<float>();
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      sums[(own_rows + row_of(e)) * Tile::kSums + n * 8 + column_of(e)] = sum[n][e];
    }
  }
  __syncthreads();
  store_sums<T, Tile>(call, own, sums);
}

template <class T, int D>
constexpr Kernel<Backward> instance(const char* name) {
  using Tile = Tile<T, D>;
  return {name,       DtypeOf<T>::value, D,          true,      dbias_kernel<T, D>,
          Tile::ROWS, Tile::THREADS,     Tile::SMEM, Tile::KEYS};
}

const Kernel<Backward> kTable[] = {
    instance<bf16, 64>("attention dbias bf16 64"),
    instance<bf16, 128>("attention dbias bf16 128"),
    instance<bf16, 256>("attention dbias bf16 256"),
    instance<fp16, 64>("attention dbias fp16 64"),
    instance<fp16, 128>("attention dbias fp16 128"),
    instance<fp16, 256>("attention dbias fp16 256"),
    instance<float, 64>("attention dbias fp32 64"),
    instance<float, 128>("attention dbias fp32 128"),
    instance<float, 256>("attention dbias fp32 256"),
};

}  // namespace

int launch_dbias(const Backward& call, void* stream) {
  const Kernel<Backward>* const kernel = kernel_for(kTable, call.shape, true);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  const Work work(call.shape, call.dbias, kernel->rows, kernel->columns);
  if (work.walked.product() > INT32_MAX) return cudaErrorInvalidValue;
  return launch_blocks(kernel, call, work.owned.product(), stream);
}

int dbias_kernels(KernelInfo* out, int capacity) { return list(kTable, out, capacity); }

}  // namespace bigkern::attention::cuda
