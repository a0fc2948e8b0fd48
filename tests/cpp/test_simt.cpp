// Every primitive that a kernel may use, held to what CUDA and the PTX ISA say it does.
//
// The emulator has to pass these tests; nvcc builds the same file, and on a machine with a GPU the
// real thing has to pass them too. That run is what turns the emulator's fragment layouts from
// belief into knowledge.
#include <cmath>
#include <random>

#include "check.h"
#include "common/cuda/cuda.cuh"
#include "common/cuda/grid_barrier.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/ptx.cuh"
#include "common/cuda/reduce.cuh"
#include "device.h"

namespace bigkern {
namespace {

__device__ int lane() { return threadIdx.x % kWarpSize; }

// ---- indices and shared memory -----------------------------------------------------------------

__global__ void index_kernel(int* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] = block * 1000 + thread;
}

TEST(every_thread_runs_once) {
  Buffer<int> out(2 * 3 * 5 * 4 * 2 * 3);
  run(index_kernel, dim3(2, 3, 5), dim3(4, 2, 3), 0, out.data());
  for (int i = 0; i < out.size(); ++i) CHECK_EQ(out[i], i / 24 * 1000 + i % 24);
}

// Reverses each block's values through static and dynamic shared memory, both of them poisoned.
__global__ void reverse_kernel(const float* in, float* out, int rounds) {
  __shared__ float fixed[64];
  float* dynamic = dynamic_smem<float>();
  const int i = threadIdx.x;
  float value = in[blockIdx.x * 64 + i];
  for (int round = 0; round < rounds; ++round) {
    fixed[i] = value;
    dynamic[i] = value + 1;
    __syncthreads();
    value = fixed[63 - i] + dynamic[63 - i];
    __syncthreads();
  }
  out[blockIdx.x * 64 + i] = value;
}

TEST(shared_memory) {
  Buffer<float> in(256), out(256);
  for (int i = 0; i < 256; ++i) in[i] = float(i);
  run(reverse_kernel, 4, 64, 64 * sizeof(float), in.data(), out.data(), 2);
  for (int i = 0; i < 256; ++i) CHECK_EQ(out[i], 4.0f * float(i) + 3.0f);
}

__global__ void large_smem_kernel(int* out, int count) {
  int* values = dynamic_smem<int>();
  for (int i = threadIdx.x; i < count; i += blockDim.x) values[i] = i;
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += blockDim.x) out[i] = values[count - 1 - i];
}

TEST(more_than_48_kib_of_dynamic_smem) {
  const int count = 96 * 1024 / 4;
  Buffer<int> out(count);
  run(large_smem_kernel, 1, 128, size_t(count) * 4, out.data(), count);
  for (int i = 0; i < count; ++i) CHECK_EQ(out[i], count - 1 - i);
}

// Threads beyond the data leave early: CUDA's block barriers do not wait for them.
__global__ void early_exit_kernel(int* out, int count) {
  int* values = dynamic_smem<int>();
  const int i = threadIdx.x;
  if (i >= count) return;
  values[i] = i;
  __syncthreads();
  out[i] = values[count - 1 - i];
}

TEST(block_barriers_ignore_exited_threads) {
  Buffer<int> out(70);
  run(early_exit_kernel, 1, 128, 70 * sizeof(int), out.data(), 70);
  for (int i = 0; i < 70; ++i) CHECK_EQ(out[i], 69 - i);
}

// ---- shuffles, votes, reductions ---------------------------------------------------------------

constexpr int kShuffles = 6;

__global__ void shuffle_kernel(int* out) {
  const int value = 100 + lane();
  int* mine = out + lane() * kShuffles;
  mine[0] = __shfl_sync(kFullMask, value, 5);
  mine[1] = __shfl_sync(kFullMask, value, 5, 8);
  mine[2] = __shfl_xor_sync(kFullMask, value, 3);
  mine[3] = __shfl_up_sync(kFullMask, value, 2, 16);
  mine[4] = __shfl_down_sync(kFullMask, value, 4);
  mine[5] = int(__shfl_down_sync(kFullMask, float(value), 1, 8));
}

TEST(shuffles) {
  Buffer<int> out(32 * kShuffles);
  run(shuffle_kernel, 1, 32, 0, out.data());
  for (int i = 0; i < 32; ++i) {
    const int* mine = out.data() + i * kShuffles;
    CHECK_EQ(mine[0], 105);
    CHECK_EQ(mine[1], 100 + i / 8 * 8 + 5);
    CHECK_EQ(mine[2], 100 + (i ^ 3));
    CHECK_EQ(mine[3], 100 + (i % 16 >= 2 ? i - 2 : i));
    CHECK_EQ(mine[4], 100 + (i < 28 ? i + 4 : i));
    CHECK_EQ(mine[5], 100 + (i % 8 < 7 ? i + 1 : i));
  }
}

// Two halves of a warp on different paths, each with its own mask.
__global__ void half_warp_kernel(int* out) {
  int value = lane();
  if (lane() < 16) {
    value += __shfl_xor_sync(0x0000ffffu, value, 1);
  } else {
    value += 100 * __shfl_xor_sync(0xffff0000u, value, 2);
    __syncwarp(0xffff0000u);
  }
  out[lane()] = value;
}

TEST(disjoint_masks) {
  Buffer<int> out(32);
  run(half_warp_kernel, 1, 32, 0, out.data());
  for (int i = 0; i < 32; ++i) CHECK_EQ(out[i], i < 16 ? i + (i ^ 1) : i + 100 * (i ^ 2));
}

struct Votes {
  unsigned ballot;
  int any, none, all, not_all;
  int block_any, block_none, block_all, block_not_all, block_count;
};

__global__ void vote_kernel(Votes* out) {
  Votes votes;
  votes.ballot = __ballot_sync(kFullMask, lane() % 3 == 0);
  votes.any = __any_sync(kFullMask, lane() == 31);
  votes.none = __any_sync(kFullMask, lane() > 31);
  votes.all = __all_sync(kFullMask, lane() < 32);
  votes.not_all = __all_sync(kFullMask, lane() < 31);
  votes.block_any = __syncthreads_or(threadIdx.x == 77);
  votes.block_none = __syncthreads_or(threadIdx.x == 777);
  votes.block_all = __syncthreads_and(threadIdx.x < 96);
  votes.block_not_all = __syncthreads_and(threadIdx.x != 40);
  votes.block_count = __syncthreads_count(threadIdx.x >= 90);
  out[threadIdx.x] = votes;
}

TEST(votes) {
  Buffer<Votes> out(96);
  run(vote_kernel, 1, 96, 0, out.data());
  for (int i = 0; i < 96; ++i) {
    CHECK_EQ(out[i].ballot, 0x49249249u);
    CHECK(out[i].any && !out[i].none && out[i].all && !out[i].not_all);
    CHECK(out[i].block_any && !out[i].block_none && out[i].block_all && !out[i].block_not_all);
    CHECK_EQ(out[i].block_count, 6);
  }
}

__global__ void reduce_kernel(const float* in, float* out) {
  __shared__ float scratch[4];
  const float value = in[threadIdx.x];
  float* mine = out + threadIdx.x * 4;
  mine[0] = warp_sum(value);
  mine[1] = warp_max<8>(value);
  mine[2] = block_sum<128>(value, scratch);
  mine[3] = block_max<128>(value, scratch);
}

TEST(reductions) {
  Buffer<float> in(128), out(128 * 4);
  for (int i = 0; i < 128; ++i) in[i] = float((i * 37) % 128);
  run(reduce_kernel, 1, 128, 0, in.data(), out.data());
  for (int i = 0; i < 128; ++i) {
    float warp_total = 0, eight_max = 0;
    for (int j = i / 32 * 32; j < i / 32 * 32 + 32; ++j) warp_total += in[j];
    for (int j = i / 8 * 8; j < i / 8 * 8 + 8; ++j) eight_max = fmaxf(eight_max, in[j]);
    CHECK_EQ(out[i * 4], warp_total);
    CHECK_EQ(out[i * 4 + 1], eight_max);
    CHECK_EQ(out[i * 4 + 2], 127.0f * 64.0f);
    CHECK_EQ(out[i * 4 + 3], 127.0f);
  }
}

// ---- memory ------------------------------------------------------------------------------------

template <class T>
__global__ void vector_kernel(const T* in, T* out) {
  const int first = (blockIdx.x * blockDim.x + threadIdx.x) * kVecWidth<T>;
  float values[kVecWidth<T>];
  load_vec(in + first, values);
  for (float& value : values) value *= 2;
  store_vec(out + first, values);
}

template <class T>
void check_vectors() {
  const int count = 2 * 32 * kVecWidth<T>;
  Buffer<T> in(count), out(count);
  for (int i = 0; i < count; ++i) in[i] = from_float<T>(float(i % 100));
  run(vector_kernel<T>, 2, 32, 0, in.data(), out.data());
  for (int i = 0; i < count; ++i) CHECK_EQ(to_float(out[i]), float(i % 100) * 2);
}

TEST(vector_loads_and_stores) {
  check_vectors<float>();
  check_vectors<bf16>();
  check_vectors<fp16>();
}

struct Totals {
  float sum;
  int count, largest, smallest;
  unsigned tickets, last, swapped;
  unsigned long long wide;
};

__global__ void atomic_kernel(Totals* totals, int* seen) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&totals->sum, 0.5f);
  atomicAdd(&totals->count, 2);
  atomicMax(&totals->largest, i);
  atomicMin(&totals->smallest, i);
  atomicAdd(&totals->wide, 1ull << 33);
  atomicCAS(&totals->swapped, 7u, 8u);
  atomicAdd(&seen[atomicInc(&totals->tickets, 15u)], 1);
  // The block that comes last knows it, and what the others wrote is there.
  __threadfence();
  if (threadIdx.x == 0 && atomicAdd(&totals->last, 1u) == gridDim.x - 1) totals->last = 1000;
}

TEST(atomics) {
  Buffer<Totals> totals(1);
  Buffer<int> seen(16);
  totals[0] = {0, 0, -1, 1000, 0, 0, 7, 0};
  for (int i = 0; i < 16; ++i) seen[i] = 0;
  run(atomic_kernel, 4, 64, 0, totals.data(), seen.data());
  CHECK_EQ(totals[0].sum, 128.0f);
  CHECK_EQ(totals[0].count, 512);
  CHECK_EQ(totals[0].largest, 255);
  CHECK_EQ(totals[0].smallest, 0);
  CHECK_EQ(totals[0].wide, 256ull << 33);
  CHECK_EQ(totals[0].swapped, 8u);
  CHECK_EQ(totals[0].last, 1000u);
  for (int i = 0; i < 16; ++i) CHECK_EQ(seen[i], 16);
}

// ---- tensor cores ------------------------------------------------------------------------------

// d[16][8] += a[16][16] * b[16][8], the fragments filled element by element as the ISA lists them.
template <class T>
__global__ void mma_kernel(const T* a, const T* b, float* d) {
  const int group = lane() / 4;
  const int quad = lane() % 4;
  const auto a_pair = [&](int row, int col) {
    return uint32_t(a[row * 16 + col].bits) | uint32_t(a[row * 16 + col + 1].bits) << 16;
  };
  const auto b_pair = [&](int row, int col) {
    return uint32_t(b[row * 8 + col].bits) | uint32_t(b[(row + 1) * 8 + col].bits) << 16;
  };
  const uint32_t a_fragment[4] = {a_pair(group, 2 * quad), a_pair(group + 8, 2 * quad),
                                  a_pair(group, 2 * quad + 8), a_pair(group + 8, 2 * quad + 8)};
  const uint32_t b_fragment[2] = {b_pair(2 * quad, group), b_pair(2 * quad + 8, group)};
  float* upper = d + group * 8 + 2 * quad;
  float* lower = upper + 8 * 8;
  float sum[4] = {upper[0], upper[1], lower[0], lower[1]};
  ptx::mma_m16n8k16<T>(sum, a_fragment, b_fragment);
  upper[0] = sum[0];
  upper[1] = sum[1];
  lower[0] = sum[2];
  lower[1] = sum[3];
}

// The same through shared memory and ldmatrix, as a kernel would: a by rows, b transposed on the
// way, since its fragments run down the columns.
template <class T>
__global__ void ldmatrix_mma_kernel(const T* a, const T* b, float* d) {
  T* a_smem = dynamic_smem<T>();  // [16][16]
  T* b_smem = a_smem + 16 * 16;   // [16][8]
  for (int i = lane(); i < 16 * 16; i += kWarpSize) a_smem[i] = a[i];
  for (int i = lane(); i < 16 * 8; i += kWarpSize) b_smem[i] = b[i];
  __syncwarp();
  uint32_t a_fragment[4], b_fragment[2];
  ptx::ldmatrix_x4(a_fragment, a_smem + lane() % 16 * 16 + lane() / 16 * 8);
  ptx::ldmatrix_x2_trans(b_fragment, b_smem + lane() % 16 * 8);
  float* upper = d + lane() / 4 * 8 + lane() % 4 * 2;
  float* lower = upper + 8 * 8;
  float sum[4] = {upper[0], upper[1], lower[0], lower[1]};
  ptx::mma_m16n8k16<T>(sum, a_fragment, b_fragment);
  upper[0] = sum[0];
  upper[1] = sum[1];
  lower[0] = sum[2];
  lower[1] = sum[3];
}

__global__ void mma_tf32_kernel(const float* a, const float* b, float* d) {
  const int group = lane() / 4;
  const int quad = lane() % 4;
  const uint32_t a_fragment[4] = {
      ptx::to_tf32(a[group * 8 + quad]), ptx::to_tf32(a[(group + 8) * 8 + quad]),
      ptx::to_tf32(a[group * 8 + quad + 4]), ptx::to_tf32(a[(group + 8) * 8 + quad + 4])};
  const uint32_t b_fragment[2] = {ptx::to_tf32(b[quad * 8 + group]),
                                  ptx::to_tf32(b[(quad + 4) * 8 + group])};
  float* upper = d + group * 8 + 2 * quad;
  float* lower = upper + 8 * 8;
  float sum[4] = {upper[0], upper[1], lower[0], lower[1]};
  ptx::mma_m16n8k8_tf32(sum, a_fragment, b_fragment);
  upper[0] = sum[0];
  upper[1] = sum[1];
  lower[0] = sum[2];
  lower[1] = sum[3];
}

// 16 x K times K x 8 on random numbers, against a scalar product in double.
template <class T, class Kernel>
void check_mma(Kernel kernel, int depth, double tolerance) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  Buffer<T> a(16 * depth), b(depth * 8);
  Buffer<float> d(16 * 8);
  for (int i = 0; i < a.size(); ++i) a[i] = from_float<T>(normal(random));
  for (int i = 0; i < b.size(); ++i) b[i] = from_float<T>(normal(random));
  std::vector<double> expected;
  for (int i = 0; i < d.size(); ++i) {
    d[i] = normal(random);
    double sum = d[i];
    for (int k = 0; k < depth; ++k) {
      sum += double(to_float(a[i / 8 * depth + k])) * to_float(b[k * 8 + i % 8]);
    }
    expected.push_back(sum);
  }
  run(kernel, 1, 32, (16 + 8) * 16 * sizeof(T), a.data(), b.data(), d.data());
  for (int i = 0; i < d.size(); ++i) CHECK(fabs(d[i] - expected[size_t(i)]) < tolerance);
}

TEST(mma_bf16) { check_mma<bf16>(mma_kernel<bf16>, 16, 1e-4); }
TEST(mma_fp16) { check_mma<fp16>(mma_kernel<fp16>, 16, 1e-4); }
TEST(mma_tf32) { check_mma<float>(mma_tf32_kernel, 8, 2e-2); }
TEST(mma_bf16_from_ldmatrix) { check_mma<bf16>(ldmatrix_mma_kernel<bf16>, 16, 1e-4); }
TEST(mma_fp16_from_ldmatrix) { check_mma<fp16>(ldmatrix_mma_kernel<fp16>, 16, 1e-4); }

__global__ void tf32_kernel(const float* in, uint32_t* out) {
  out[threadIdx.x] = ptx::to_tf32(in[threadIdx.x]);
}

TEST(tf32_rounds_ties_away) {
  Buffer<float> in(6);
  Buffer<uint32_t> out(6);
  const uint32_t bits[6] = {0x3f800000u, 0x3f800fffu, 0x3f801000u,
                            0xbf803000u, 0x3f7fffffu, 0x7f800000u};
  const uint32_t rounded[6] = {0x3f800000u, 0x3f800000u, 0x3f802000u,
                               0xbf804000u, 0x3f800000u, 0x7f800000u};
  for (int i = 0; i < 6; ++i) in[i] = detail::bits_float(bits[i]);
  run(tf32_kernel, 1, 6, 0, in.data(), out.data());
  // The low bits of the register are undefined; the product does not look at them.
  for (int i = 0; i < 6; ++i) CHECK_EQ(out[i] & 0xffffe000u, rounded[i]);
}

// Four 8x8 matrices of consecutive numbers; 12 registers a lane.
__global__ void ldmatrix_kernel(uint32_t* out) {
  uint16_t* matrices = dynamic_smem<uint16_t>();
  for (int i = lane(); i < 4 * 64; i += kWarpSize) matrices[i] = uint16_t(i);
  __syncwarp();
  const uint16_t* row = matrices + lane() * 8;
  uint32_t four[4], two[2];
  uint32_t* mine = out + lane() * 12;
  ptx::ldmatrix_x4(four, row);
  for (int i = 0; i < 4; ++i) mine[i] = four[i];
  ptx::ldmatrix_x4_trans(four, row);
  for (int i = 0; i < 4; ++i) mine[4 + i] = four[i];
  ptx::ldmatrix_x2(two, row);
  for (int i = 0; i < 2; ++i) mine[8 + i] = two[i];
  ptx::ldmatrix_x2_trans(two, row);
  for (int i = 0; i < 2; ++i) mine[10 + i] = two[i];
}

TEST(ldmatrix) {
  Buffer<uint32_t> out(32 * 12);
  run(ldmatrix_kernel, 1, 32, 4 * 64 * sizeof(uint16_t), out.data());
  for (int i = 0; i < 32; ++i) {
    const uint32_t* mine = out.data() + i * 12;
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int major = i / 4, minor = i % 4 * 2;
      const int plain = matrix * 64 + major * 8 + minor;
      const int transposed = matrix * 64 + minor * 8 + major;
      CHECK_EQ(mine[matrix], uint32_t(plain | (plain + 1) << 16));
      CHECK_EQ(mine[4 + matrix], uint32_t(transposed | (transposed + 8) << 16));
      if (matrix >= 2) continue;
      CHECK_EQ(mine[8 + matrix], uint32_t(plain | (plain + 1) << 16));
      CHECK_EQ(mine[10 + matrix], uint32_t(transposed | (transposed + 8) << 16));
    }
  }
}

// ---- asynchronous copies -----------------------------------------------------------------------

// Sums the tiles of a row, the next two always in flight; what lies past the end counts as zero.
constexpr int kStages = 3;
constexpr int kTile = 32 * 4;  // floats

__global__ void pipeline_kernel(const float* in, float* out, int count, int tiles) {
  float* stages = dynamic_smem<float>();  // [kStages][kTile]
  const auto fetch = [&](int tile) {
    const int first = tile * kTile + lane() * 4;
    if (tile < tiles) {
      float* target = stages + tile % kStages * kTile + lane() * 4;
      const bool valid = first < count;
      ptx::cp_async_16(target, valid ? in + first : in, valid);
    }
    ptx::cp_async_commit();
  };
  for (int tile = 0; tile < kStages - 1; ++tile) fetch(tile);
  float sum = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();
    fetch(tile + kStages - 1);
    for (int i = 0; i < 4; ++i) sum += stages[tile % kStages * kTile + i * 32 + lane()];
  }
  out[lane()] = sum;
}

TEST(cp_async_pipeline) {
  const int tiles = 7, count = 6 * kTile + 20;
  Buffer<float> in(tiles * kTile), out(32);
  for (int i = 0; i < count; ++i) in[i] = float(i);
  run(pipeline_kernel, 1, 32, kStages * kTile * sizeof(float), in.data(), out.data(), count, tiles);
  for (int i = 0; i < 32; ++i) {
    float sum = 0;
    for (int j = i; j < count; j += 32) sum += float(j);
    CHECK_EQ(out[i], sum);
  }
}

__global__ void small_copies_kernel(const float* in, float* out) {
  float* staged = dynamic_smem<float>();
  ptx::cp_async_4(staged + lane(), in + lane(), lane() % 2 == 0);
  ptx::cp_async_commit();
  ptx::cp_async_8(staged + 32 + 2 * lane(), in + 2 * lane(), lane() % 4 != 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  for (int i = lane(); i < 96; i += 32) out[i] = staged[i];
}

TEST(cp_async_of_4_and_8_bytes) {
  Buffer<float> in(64), out(96);
  for (int i = 0; i < 64; ++i) in[i] = float(i + 1);
  run(small_copies_kernel, 1, 32, 96 * sizeof(float), in.data(), out.data());
  for (int i = 0; i < 32; ++i) CHECK_EQ(out[i], i % 2 == 0 ? float(i + 1) : 0.0f);
  for (int i = 0; i < 64; ++i) CHECK_EQ(out[32 + i], i / 2 % 4 != 0 ? float(i + 1) : 0.0f);
}

// ---- vector stores -----------------------------------------------------------------------------

__global__ void vector_stores_kernel(uint32_t* out) {
  const uint32_t n = lane();
  ptx::store_global(out + 4 * n, make_uint4(n, n + 100, n + 200, n + 300));
  ptx::store_global(out + 128 + 2 * n, make_uint2(n, n + 100));
}

TEST(store_global_of_16_and_8_bytes) {
  Buffer<uint32_t> out(192);
  run(vector_stores_kernel, 1, 32, 0, out.data());
  for (int i = 0; i < 128; ++i) CHECK_EQ(out[i], uint32_t(i / 4 + i % 4 * 100));
  for (int i = 0; i < 64; ++i) CHECK_EQ(out[128 + i], uint32_t(i / 2 + i % 2 * 100));
}

// ---- named barriers ----------------------------------------------------------------------------

// One warp produces, one consumes, with two buffers between them: for each of them a barrier that
// says full and one that says empty.
__global__ void producer_consumer_kernel(float* out, int rounds) {
  float* buffers = dynamic_smem<float>();  // [2][32]
  const auto full = [](int buffer) { return 1 + buffer; };
  const auto empty = [](int buffer) { return 3 + buffer; };
  if (threadIdx.x < 32) {
    for (int round = 0; round < rounds; ++round) {
      const int buffer = round % 2;
      if (round >= 2) ptx::named_barrier_sync(empty(buffer), 64);
      buffers[buffer * 32 + lane()] = float(round * 100 + lane());
      ptx::named_barrier_arrive(full(buffer), 64);
    }
  } else {
    for (int round = 0; round < rounds; ++round) {
      const int buffer = round % 2;
      ptx::named_barrier_sync(full(buffer), 64);
      out[round * 32 + lane()] = buffers[buffer * 32 + 31 - lane()];
      if (round + 2 < rounds) ptx::named_barrier_arrive(empty(buffer), 64);
    }
  }
}

TEST(named_barriers) {
  const int rounds = 9;
  Buffer<float> out(rounds * 32);
  run(producer_consumer_kernel, 1, 64, 64 * sizeof(float), out.data(), rounds);
  for (int i = 0; i < out.size(); ++i) CHECK_EQ(out[i], float(i / 32 * 100 + 31 - i % 32));
}

// ---- math --------------------------------------------------------------------------------------

__global__ void math_kernel(const float* in, float* out) {
  const float x = in[threadIdx.x];
  float* mine = out + threadIdx.x * 6;
  mine[0] = ptx::exp2_approx(x);
  mine[1] = ptx::rcp_approx(x);
  mine[2] = rsqrtf(fabsf(x));
  mine[3] = __expf(x);
  mine[4] = ptx::unpack2<bf16>(ptx::pack2<bf16>(x, 1.0f)).x;
  mine[5] = ptx::unpack2<fp16>(ptx::pack2<fp16>(1.0f, x)).y;
}

TEST(math) {
  Buffer<float> in(64), out(64 * 6);
  for (int i = 0; i < 64; ++i) in[i] = (float(i) - 31.5f) / 4;
  run(math_kernel, 1, 64, 0, in.data(), out.data());
  const auto close = [](float a, double b) { return fabs(a - b) <= 1e-6 * (fabs(b) + 1e-6); };
  for (int i = 0; i < 64; ++i) {
    const float x = in[i];
    const float* mine = out.data() + i * 6;
    CHECK(close(mine[0], exp2(double(x))));
    CHECK(close(mine[1], 1 / double(x)));
    CHECK(close(mine[2], 1 / sqrt(fabs(double(x)))));
    CHECK(fabs(mine[3] - exp(double(x))) <= 2e-6 * exp(double(x)));
    CHECK_EQ(mine[4], to_float(from_float<bf16>(x)));
    CHECK_EQ(mine[5], to_float(from_float<fp16>(x)));
  }
}

__global__ void special_values_kernel(float* out) {
  out[0] = ptx::exp2_approx(-INFINITY);
  out[1] = ptx::exp2_approx(-140.0f);  // subnormal, and so flushed
  out[2] = ptx::exp2_approx(INFINITY);
  out[3] = ptx::rcp_approx(0.0f);
  out[4] = ptx::rcp_approx(-INFINITY);
}

TEST(special_values) {
  Buffer<float> out(5);
  run(special_values_kernel, 1, 1, 0, out.data());
  CHECK_EQ(out[0], 0.0f);
  CHECK_EQ(out[1], 0.0f);
  CHECK_EQ(out[2], INFINITY);
  CHECK_EQ(out[3], INFINITY);
  CHECK(out[4] == 0.0f && std::signbit(out[4]));
}

// ---- between blocks ----------------------------------------------------------------------------

// Four blocks add up what all of them wrote in the round before.
__global__ void rounds_kernel(float* values, unsigned* counter, int rounds) {
  const int blocks = int(gridDim.x), threads = int(blockDim.x), i = int(threadIdx.x);
  for (int round = 0; round < rounds; ++round) {
    const float* const before = values + round % 2 * blocks * threads;
    float* const after = values + (round + 1) % 2 * blocks * threads;
    grid_wait(counter, unsigned(blocks * round));
    float sum = 0;
    for (int block = 0; block < blocks; ++block) sum += before[block * threads + i];
    after[int(blockIdx.x) * threads + i] = sum;
    grid_arrive(counter);
  }
}

TEST(blocks_wait_for_each_other) {
  Buffer<float> values(2 * 4 * 64);
  Buffer<unsigned> counter(1);
  counter[0] = 0;
  for (int i = 0; i < values.size(); ++i) values[i] = float(i / 64 + 1);
  run_cooperative(rounds_kernel, 4, 64, 0, values.data(), counter.data(), 4);
  for (int i = 0; i < 256; ++i) CHECK_EQ(values[i], 640.0f);
}

}  // namespace
}  // namespace bigkern
