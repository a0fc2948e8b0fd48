// Attention, decode: a few queries of each sequence against a long cache, whose pages may lie
// anywhere.
//
// Every key and value is used by few rows, so the time is that of reading the cache once. The query
// heads that share a key head, times their queries, are the rows of one tile: a cache of grouped
// heads is read once for all of them. Tensor cores do the products even of a single row: fifteen
// rows of zeros cost less than the multiply-adds they replace, and one path serves all.
//
// Where heads are too few to fill the GPU, the visible keys of each sequence are cut into spans of
// equal length (Flash-Decoding). A second kernel joins their results in the spans' order.
//
//   shared     q [16 strips, D]    k, v [KEYS, D], two stages
//   registers, of each warp        s, p [16, STEP] fp32    o [16, COLUMNS] fp32    m, l [16]
//   workspace  of each span        o [B, Hq, Sq, Dv]    m, l [B, Hq, Sq]    fp32
//
//   one strip: four warps take turns at its keys    two: two warps each    four: one warp each
//
// Source: Dao et al., Flash-Decoding for long-context inference (2023).
#include "attention/cuda/decode.cuh"

namespace bigkern::attention::cuda {
namespace {

constexpr int kBlocksAtOnce = 2;  // on one multiprocessor

// A stage is 16 KiB of keys and as many of values, whatever a row's length. Each warp has one strip
// and COLUMNS columns of o; where that is not all, SPLIT warps, a group, compute the same p.
template <class T, int D>
struct Tile {
  static constexpr int kRowBytes = D * int(sizeof(T));
  static constexpr int KEYS = 16384 / kRowBytes;
  static constexpr int STEP = KEYS >= 128 ? 32 : 16;  // keys that a warp does at a time
  static constexpr int STRIPS = kRowBytes <= 256 ? 4 : 1024 / kRowBytes;  // at most
  static constexpr int STAGES = 2;
  static constexpr int SPLIT = kRowBytes > 512 ? 2 : 1;  // warps that share the columns of o
  static constexpr int COLUMNS = D / SPLIT, GROUPS = kDecodeWarps / SPLIT;
  static constexpr int kStage = KEYS * kPitch<T, D>;  // elements, of k or v
  static constexpr size_t SMEM = size_t(16 * STRIPS + 2 * STAGES * KEYS) * kPitch<T, D> * sizeof(T);
  static constexpr int kSums = D + 8;  // floats from one row of o to the next: other banks
  static_assert(size_t(16 * GROUPS) * (kSums + 2) * sizeof(float) <= SMEM, "no room for o");
};

// Turns the products q k^T of a strip with the keys from j0 on into scores.
template <class T, int N>
__device__ __forceinline__ void to_scores(float (&s)[N][4], const Shape& shape,
                                          const DecodeRow (&rows)[2], int j0) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const DecodeRow& row = rows[e / 2];
      const int j = j0 + n * 8 + column_of(e);
      float x = s[n][e] * (shape.scale * kUnit<T>);
      if (shape.softcap != 0.0f) cap<T>(x, shape.softcap);
      x -= row.slope * kUnit<T> * float(abs(row.place - j));
      s[n][e] = j >= row.seen.begin && j < row.seen.end ? x : -INFINITY;
    }
  }
}

// Joins what the groups have of each row, and stores it: as o and lse, or as a span's part of them.
template <class T, int D>
__device__ __forceinline__ void store_rows(const DecodeWork& work, int b, int h_kv, int row0,
                                           int span, const Softmax& row,
                                           const float (&acc)[Tile<T, D>::COLUMNS / 8][4]) {
  using Tile = Tile<T, D>;
  constexpr int kSums = Tile::kSums, kRows = 16 * Tile::GROUPS;
  float* const o = dynamic_smem<float>();  // [kRows, kSums]
  float* const m = o + kRows * kSums;
  float* const l = m + kRows;
  const int column0 = warp() % Tile::SPLIT * Tile::COLUMNS;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = warp() / Tile::SPLIT * 16 + row_of(2 * half);
    const float sum = warp_sum<4>(row.l[half]);
    if (lane() % 4 == 0 && column0 == 0) m[r] = row.m[half], l[r] = sum;
#pragma unroll
    for (int n = 0; n < Tile::COLUMNS / 8; ++n) {
      store_pair(o + r * kSums + column0 + n * 8 + column_of(0), acc[n][2 * half],
                 acc[n][2 * half + 1]);
    }
  }
  __syncthreads();

  const Shape& shape = work.call.shape;
  const int group = int(rows_of_group(shape)), stride = 16 * work.strips;
  const int64_t first = (int64_t(b) * shape.Hkv + h_kv) * group + row0;
  for (int r = warp(); r < min(stride, group - row0); r += kDecodeWarps) {
    const Joined<T> joined(m + r, l + r, stride, Tile::GROUPS / work.strips);
    const auto sum_of = [&](int c) { return joined.sum(o + r * kSums + c, stride * kSums); };
    if (work.spans == 1) {
      joined.store(work.call, first + r, sum_of);
    } else {
      const Partial partial(work, span);
      if (lane() == 0) partial.m[first + r] = joined.m, partial.l[first + r] = joined.l;
      for (int c = lane(); c < shape.Dv; c += kWarpSize) {
        partial.o[(first + r) * shape.Dv + c] = sum_of(c);
      }
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kDecodeThreads, kBlocksAtOnce)
    decode_kernel(const __grid_constant__ DecodeWork work) {
  using Tile = Tile<T, D>;
  constexpr int KEYS = Tile::KEYS, STEP = Tile::STEP, STAGES = Tile::STAGES;
  constexpr int COLUMNS = Tile::COLUMNS;
  T* const q_tile = dynamic_smem<T>();
  T* const k_tiles = q_tile + 16 * Tile::STRIPS * kPitch<T, D>;
  T* const v_tiles = k_tiles + STAGES * Tile::kStage;

  const Decode& call = work.call;
  const Shape& shape = call.shape;
  const int span = blockIdx.x % work.spans, tile = blockIdx.x / work.spans % work.tiles;
  const int head = blockIdx.x / work.spans / work.tiles, Hkv = int(shape.Hkv);
  const int b = head / Hkv, h_kv = head % Hkv, row0 = tile * 16 * work.strips;
  const Window window = window_of(call, b);
  const Spans spans(work, window);
  if (span >= spans.count) return;
  const Range keys = spans.at(span);

  const auto load_step = [&](int j0, int stage) {
    if (j0 < keys.end) {
      load_cached<KEYS, D>(k_tiles + stage * Tile::kStage, call, call.k, shape.D, b, h_kv, j0,
                           keys.end);
      load_cached<KEYS, D>(v_tiles + stage * Tile::kStage, call, call.v, shape.Dv, b, h_kv, j0,
                           keys.end);
    }
    ptx::cp_async_commit();
  };
  load_queries<16 * Tile::STRIPS, D>(q_tile, work, b, h_kv, row0);
  for (int stage = 0; stage < STAGES; ++stage) load_step(keys.begin + stage * KEYS, stage);

  const int group = warp() / Tile::SPLIT, column0 = warp() % Tile::SPLIT * COLUMNS;
  const int strip = group % work.strips, part = group / work.strips;
  const int r = row0 + strip * 16 + row_of(0);
  const DecodeRow rows[2] = {{shape, window, b, h_kv, r}, {shape, window, b, h_kv, r + 8}};
  const bool first = span == 0 && part == 0;  // it is where the sinks are counted
  Softmax row(first ? rows[0].sink * kUnit<T> : -INFINITY,
              first ? rows[1].sink * kUnit<T> : -INFINITY);
  float acc[COLUMNS / 8][4] = {};
  int stage = 0;
  for (int j0 = keys.begin; j0 < keys.end; j0 += KEYS, stage = (stage + 1) % STAGES) {
    ptx::cp_async_wait<STAGES - 1>();
    __syncthreads();  // this stage is here
    const int count = min(KEYS, keys.end - j0), stride = Tile::GROUPS / work.strips * STEP;
    for (int j = part * STEP; j < count; j += stride) {
      const int at = stage * Tile::kStage + j * kPitch<T, D>;
      float s[STEP / 8][4], rescale[2];
      dot_rows<STEP, D>(s, q_tile + strip * 16 * kPitch<T, D>, k_tiles + at);
      to_scores<T>(s, shape, rows, j0 + j);
      softmax_step<T>(row, s, rescale);
      scale_rows(acc, rescale);
      accumulate<STEP, COLUMNS, D>(acc, s, v_tiles + at + column0);
    }
    __syncthreads();  // every warp is done with this stage
    load_step(j0 + STAGES * KEYS, stage);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // even without keys q was on its way, to where o goes now
  store_rows<T, D>(work, b, h_kv, row0, span, row, acc);
}

// ---- joining spans
// -------------------------------------------------------------------------------

constexpr int kRowsPerBlock = 4;  // one warp each

template <class T>
__global__ void __launch_bounds__(kRowsPerBlock* kWarpSize)
    join_kernel(const __grid_constant__ DecodeWork work) {
  const Shape& shape = work.call.shape;
  const int64_t rows = shape.B * shape.Hq * shape.Sq;
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + warp();
  if (row >= rows) return;
  const Window window = window_of(work.call, int(row / shape.Sq / shape.Hq));
  const Partial partial(work, 0);
  const Joined<T> joined(partial.m + row, partial.l + row, rows, Spans(work, window).count);
  joined.store(work.call, row,
               [&](int c) { return joined.sum(partial.o + row * shape.Dv + c, rows * shape.Dv); });
}

// ---- for the host
// --------------------------------------------------------------------------------

constexpr int64_t kMostBlocks = 1024;  // that keys are cut for: bounds the workspace on every GPU
constexpr int64_t kTilesOfSpan = 2;    // at least: shorter ones write and read more than they save

template <class T, int D>
constexpr Kernel<DecodeWork> instance(const char* name) {
  using Tile = Tile<T, D>;
  return {name,           DtypeOf<T>::value,   D,
          false,          decode_kernel<T, D>, 16 * Tile::STRIPS,
          kDecodeThreads, Tile::SMEM,          Tile::KEYS};
}

const Kernel<DecodeWork> kTable[] = {
    instance<bf16, 64>("attention decode bf16 64"),
    instance<bf16, 128>("attention decode bf16 128"),
    instance<bf16, 256>("attention decode bf16 256"),
    instance<fp16, 64>("attention decode fp16 64"),
    instance<fp16, 128>("attention decode fp16 128"),
    instance<fp16, 256>("attention decode fp16 256"),
    instance<float, 64>("attention decode fp32 64"),
    instance<float, 128>("attention decode fp32 128"),
    instance<float, 256>("attention decode fp32 256"),
};

template <class T>
constexpr Kernel<DecodeWork> join_instance(const char* name) {
  return {name,
          DtypeOf<T>::value,
          kMaxHeadDim,
          false,
          join_kernel<T>,
          kRowsPerBlock,
          kRowsPerBlock * kWarpSize,
          0};
}

const Kernel<DecodeWork> kJoinTable[] = {
    join_instance<bf16>("attention join bf16"),
    join_instance<fp16>("attention join fp16"),
    join_instance<float>("attention join fp32"),
};

// How a call is shared out on a GPU of any size: with the most spans there can be.
DecodeWork work_of(const Decode& call, const Kernel<DecodeWork>& kernel) {
  const Shape& shape = call.shape;
  const int64_t rows = rows_of_group(shape);
  int strips = 1;
  while (strips * 16 < std::min<int64_t>(rows, kernel.rows)) strips *= 2;
  const int64_t tiles = ceil_div(rows, 16 * strips), heads = shape.B * shape.Hkv * tiles;
  const int64_t seen = std::min(shape.Sk, shape.Sq + shape.left + shape.right);
  const int64_t spans = std::min(kMostBlocks / std::max<int64_t>(heads, 1),
                                 ceil_div(seen, kTilesOfSpan * kernel.columns));
  return {call, strips, int(tiles), int(std::max<int64_t>(spans, 1)), kernel.columns};
}

// The fewest spans that keep the multiprocessors within a tenth as busy as any number would.
int busy_spans(int64_t blocks, int most, int multiprocessors) {
  const int64_t slots = int64_t(multiprocessors) * kBlocksAtOnce;
  const auto busy = [&](int64_t spans) {
    return double(blocks * spans) / double(ceil_div(blocks * spans, slots) * slots);
  };
  double best = 0;
  for (int spans = 1; spans <= most; ++spans) best = std::max(best, busy(spans));
  int spans = 1;
  while (spans < most && busy(spans) < 0.9 * best) ++spans;
  return spans;
}

}  // namespace

size_t decode_workspace(const Shape& shape) {
  const Kernel<DecodeWork>* const kernel = kernel_for(kTable, shape, false);
  if (kernel == nullptr) return 0;
  Decode call{};
  call.shape = shape;
  const int64_t spans = work_of(call, *kernel).spans;
  if (spans == 1) return 0;
  return size_t(spans * shape.B * shape.Hq * shape.Sq * (shape.Dv + 2)) * sizeof(float);
}

int decode(const Decode& call, void* stream) {
  const Kernel<DecodeWork>* const kernel = kernel_for(kTable, call.shape, false);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  int multiprocessors = 0;
  int error = multiprocessor_count(&multiprocessors);
  if (error != cudaSuccess) return error;
  DecodeWork work = work_of(call, *kernel);
  const int64_t blocks = call.shape.B * call.shape.Hkv * work.tiles;
  work.spans = busy_spans(blocks, work.spans, multiprocessors);
  error = launch_blocks(kernel, work, blocks * work.spans, stream);
  if (error != cudaSuccess || work.spans == 1) return error;
  const int64_t rows = call.shape.B * call.shape.Hq * call.shape.Sq;
  return launch_blocks(kernel_for(kJoinTable, call.shape, false), work,
                       ceil_div(rows, kRowsPerBlock), stream);
}

int decode_kernels(KernelInfo* out, int capacity) {
  const int count = list(kTable, out, capacity);
  return count + list(kJoinTable, out + count, capacity - count);
}

}  // namespace bigkern::attention::cuda
