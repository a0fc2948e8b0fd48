// Kernels with one mistake each, and the proof that the emulator catches it: by a fault that names
// the place, or by a result that is wrong or NaN under some schedule.
#include <cmath>
#include <functional>
#include <set>
#include <string>

#include "check.h"
#include "common/cuda/cuda.cuh"
#include "common/cuda/grid_barrier.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/ptx.cuh"
#include "common/cuda/reduce.cuh"
#include "device.h"

namespace bigkern {

constexpr int kSeeds = 16;

// Runs the kernel, which must fail, and checks that the report has each of the words.
template <class... P, class... A>
void expect_fault(std::initializer_list<const char*> words, void (*kernel)(P...), int threads,
                  size_t smem_bytes, A... args) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    simt::set_seed(uint64_t(seed));
    const cudaError_t error = launch(kernel, 2, unsigned(threads), smem_bytes, nullptr, args...);
    CHECK_EQ(int(error), int(cudaErrorLaunchFailure));
    const std::string report = cudaGetErrorString(error);
    for (const char* word : words) {
      if (report.find(word) != std::string::npos) continue;
      std::cerr << "no \"" << word << "\" in: " << report << "\n";
      CHECK(false);
    }
  }
}

// How many of the seeds give a result that is not the expected one.
int wrong_results(const std::function<bool()>& run_and_compare) {
  int wrong = 0;
  for (int seed = 0; seed < kSeeds; ++seed) {
    simt::set_seed(uint64_t(seed));
    wrong += !run_and_compare();
  }
  return wrong;
}

// ---- missing synchronisation -------------------------------------------------------------------

// Neighbours swap through shared memory, several times. The first barrier guards the read after
// the write, the second one the next write after the read.
template <bool FIRST, bool SECOND>
__global__ void swap_kernel(float* out) {
  float* values = dynamic_smem<float>();
  float value = float(threadIdx.x);
  for (int round = 0; round < 3; ++round) {
    values[threadIdx.x] = value + float(round);
    if (FIRST) __syncthreads();
    value = values[blockDim.x - 1 - threadIdx.x];
    if (SECOND) __syncthreads();
  }
  out[threadIdx.x] = value;
}

bool swap_is_right(void (*kernel)(float*)) {
  Buffer<float> out(128);
  run(kernel, 1, 128, 128 * sizeof(float), out.data());
  for (int i = 0; i < 128; ++i) {
    if (out[i] != float(127 - i) + 3.0f) return false;
  }
  return true;
}

TEST(barriers_in_place) {
  CHECK_EQ(wrong_results([] { return swap_is_right(swap_kernel<true, true>); }), 0);
}
TEST(missing_barrier_after_write) {
  CHECK_EQ(wrong_results([] { return swap_is_right(swap_kernel<false, true>); }), kSeeds);
}
TEST(missing_barrier_after_read) {
  CHECK(wrong_results([] { return swap_is_right(swap_kernel<true, false>); }) > kSeeds / 2);
}

// The same within a warp, where lanes happen to run together on many GPUs.
template <bool SYNC>
__global__ void warp_swap_kernel(float* out) {
  float* values = dynamic_smem<float>();
  values[threadIdx.x] = float(threadIdx.x);
  if (SYNC) __syncwarp();
  out[threadIdx.x] = values[31 - threadIdx.x];
}

bool warp_swap_is_right(void (*kernel)(float*)) {
  Buffer<float> out(32);
  run(kernel, 1, 32, 32 * sizeof(float), out.data());
  for (int i = 0; i < 32; ++i) {
    if (out[i] != float(31 - i)) return false;
  }
  return true;
}

TEST(missing_syncwarp) {
  CHECK_EQ(wrong_results([] { return warp_swap_is_right(warp_swap_kernel<true>); }), 0);
  CHECK_EQ(wrong_results([] { return warp_swap_is_right(warp_swap_kernel<false>); }), kSeeds);
}

__global__ void unwritten_dynamic_kernel(float* out) {
  out[blockIdx.x * 32 + threadIdx.x] = dynamic_smem<float>()[threadIdx.x];
  dynamic_smem<float>()[threadIdx.x] = 1;  // The next block must not see this.
}

TEST(unwritten_dynamic_smem_is_nan) {
  Buffer<float> out(64);
  for (int i = 0; i < 64; ++i) out[i] = 0;
  run(unwritten_dynamic_kernel, 2, 32, 128, out.data());
  for (int i = 0; i < 64; ++i) CHECK(std::isnan(out[i]));
}

// WAIT is how many groups may stay in flight: 0 is right, 1 is one too many.
template <int WAIT>
__global__ void copy_kernel(const float* in, float* out) {
  float* staged = dynamic_smem<float>();
  ptx::cp_async_4(staged + threadIdx.x, in + threadIdx.x, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<WAIT>();
  __syncthreads();
  out[threadIdx.x] = staged[threadIdx.x];
}

__global__ void uncommitted_copy_kernel(const float* in, float* out) {
  float* staged = dynamic_smem<float>();
  ptx::cp_async_4(staged + threadIdx.x, in + threadIdx.x, true);
  ptx::cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = staged[threadIdx.x];
}

bool copies_arrive(void (*kernel)(const float*, float*)) {
  Buffer<float> in(64), out(64);
  for (int i = 0; i < 64; ++i) in[i] = float(i);
  run(kernel, 1, 64, 64 * sizeof(float), in.data(), out.data());
  int nans = 0;
  for (int i = 0; i < 64; ++i) nans += std::isnan(out[i]);
  CHECK(nans == 0 || nans == 64);
  return nans == 0;
}

TEST(missing_cp_async_wait) {
  CHECK(copies_arrive(copy_kernel<0>));
  CHECK(!copies_arrive(copy_kernel<1>));
  CHECK(!copies_arrive(uncommitted_copy_kernel));
}

// ---- divergence --------------------------------------------------------------------------------

__global__ void divergent_shuffle_kernel(int* out) {
  int value = int(threadIdx.x);
  if (threadIdx.x % 2 == 0) value = __shfl_xor_sync(kFullMask, value, 2);
  __syncthreads();
  out[threadIdx.x] = value;
}

__global__ void exiting_lanes_kernel(int* out) {
  if (threadIdx.x >= 20) return;
  out[threadIdx.x] = int(__ballot_sync(kFullMask, 1));
}

__global__ void different_operations_kernel(int* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __any_sync(kFullMask, 1);
  } else {
    out[threadIdx.x] = __shfl_sync(kFullMask, 1, 0);
  }
}

__global__ void wrong_mask_kernel(int* out) { out[threadIdx.x] = __shfl_sync(0xffffu, 1, 0); }

TEST(divergent_warp_operations) {
  Buffer<int> out(64);
  expect_fault({"divergence", "__shfl_xor_sync", "0xffffffff", "__syncthreads", "test_simt_faults"},
               divergent_shuffle_kernel, 64, 0, out.data());
  expect_fault({"divergence", "__ballot_sync", "exit"}, exiting_lanes_kernel, 32, 0, out.data());
  expect_fault({"divergence", "__any_sync", "__shfl_sync"}, different_operations_kernel, 32, 0,
               out.data());
  expect_fault({"0x0000ffff", "does not name the calling lane"}, wrong_mask_kernel, 32, 0,
               out.data());
}

__global__ void divergent_barriers_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void skipped_barrier_kernel(int* out) {
  if (threadIdx.x % 32 != 5) __syncthreads();
  out[threadIdx.x] = __any_sync(kFullMask, 1);
}

TEST(divergent_block_barriers) {
  Buffer<int> out(64);
  expect_fault({"divergence", "__syncthreads at"}, divergent_barriers_kernel, 64, 0);
  expect_fault({"divergence", "62 threads", "wait at __syncthreads", "wait at __any_sync"},
               skipped_barrier_kernel, 64, 0, out.data());
}

// ---- named barriers ----------------------------------------------------------------------------

__global__ void missing_arrival_kernel() {
  if (threadIdx.x < 32) ptx::named_barrier_sync(2, 64);
}

__global__ void double_arrival_kernel() {
  ptx::named_barrier_arrive(1, 64);
  ptx::named_barrier_arrive(1, 64);
}

__global__ void different_counts_kernel() {
  ptx::named_barrier_sync(1, threadIdx.x < 32 ? 64 : 96);
}

__global__ void barrier_zero_kernel() { ptx::named_barrier_sync(0, 32); }

TEST(named_barrier_mistakes) {
  expect_fault({"missing_arrival_kernel", "deadlock", "32 threads", "barrier 2", "32 of 64 arrived",
                "have exited"},
               missing_arrival_kernel, 64, 0);
  expect_fault({"arrives twice"}, double_arrival_kernel, 64, 0);
  expect_fault({"other threads expect"}, different_counts_kernel, 96, 0);
  expect_fault({"1 to 15"}, barrier_zero_kernel, 32, 0);
}

// ---- blocks that wait for each other -----------------------------------------------------------

// In each round, every block takes over what its left neighbour had, and adds one.
template <bool WAIT>
__global__ void ring_kernel(float* values, unsigned* counter) {
  const int blocks = int(gridDim.x), left = (int(blockIdx.x) + blocks - 1) % blocks;
  for (int round = 0; round < 6; ++round) {
    if (WAIT) grid_wait(counter, unsigned(blocks * round));
    const float* before = values + round % 2 * blocks;
    float* after = values + (round + 1) % 2 * blocks;
    if (threadIdx.x == 0) after[blockIdx.x] = before[left] + 1;
    grid_arrive(counter);
  }
}

bool ring_is_right(void (*kernel)(float*, unsigned*)) {
  Buffer<float> values(8);
  Buffer<unsigned> counter(1);
  counter[0] = 0;
  for (int i = 0; i < 8; ++i) values[i] = float(10 * i);
  run_cooperative(kernel, 4, 64, 0, values.data(), counter.data());
  for (int i = 0; i < 4; ++i) {
    if (values[i] != float(10 * ((i + 2) % 4) + 6)) return false;
  }
  return true;
}

TEST(missing_grid_wait) {
  CHECK_EQ(wrong_results([] { return ring_is_right(ring_kernel<true>); }), 0);
  CHECK(wrong_results([] { return ring_is_right(ring_kernel<false>); }) > kSeeds / 2);
}

__global__ void absent_block_kernel(unsigned* counter) {
  if (blockIdx.x == 1) return;
  grid_arrive(counter);
  grid_wait(counter, gridDim.x);
}

TEST(grid_barrier_mistakes) {
  Buffer<unsigned> counter(1);
  const auto fails = [&](auto launch_kernel, const char* word) {
    counter[0] = 0;
    CHECK_EQ(int(launch_kernel()), int(cudaErrorLaunchFailure));
    CHECK(std::string(cudaGetErrorString(cudaErrorLaunchFailure)).find(word) != std::string::npos);
  };
  const auto absent = absent_block_kernel;
  fails([&] { return launch_cooperative(absent, 4, 64, 0, nullptr, counter.data()); },
        "wait at a counter to be 4, which is 3");
  // Blocks that do not have to run at once must not wait for each other.
  Buffer<float> values(8);
  const auto ring = ring_kernel<true>;
  fails([&] { return launch(ring, 4, 64, 0, nullptr, values.data(), counter.data()); },
        "wait at a counter to be 4, which is 1");
}

// ---- addresses ---------------------------------------------------------------------------------

__global__ void misaligned_vector_kernel(float* out) {
  store_vec(out + 1, Vec<float, 4>{{1, 2, 3, 4}});
}

template <class Words>
__global__ void misaligned_store_kernel(float* out) {
  ptx::store_global(out + 1, Words{});
}

__global__ void misaligned_copy_kernel(const float* in) {
  ptx::cp_async_16(dynamic_smem<float>(), in + 1, true);
}

__global__ void misaligned_row_kernel() {
  uint32_t r[4];
  ptx::ldmatrix_x4(r, dynamic_smem<float>() + threadIdx.x);
}

TEST(misaligned_addresses) {
  Buffer<float> memory(64);
  expect_fault({"misaligned", "reduce.cuh"}, misaligned_vector_kernel, 1, 0, memory.data());
  expect_fault({"misaligned", "test_simt_faults"}, misaligned_store_kernel<uint4>, 1, 0,
               memory.data());
  expect_fault({"misaligned", "test_simt_faults"}, misaligned_store_kernel<uint2>, 1, 0,
               memory.data());
  expect_fault({"misaligned", "test_simt_faults"}, misaligned_copy_kernel, 1, 64, memory.data());
  expect_fault({"misaligned", "test_simt_faults"}, misaligned_row_kernel, 32, 512);
}

// ---- the rest ----------------------------------------------------------------------------------

__global__ void trap_kernel() {
  if (threadIdx.x == 3) __trap();
}

TEST(traps_name_the_thread) { expect_fault({"thread (3,0,0)", "__trap"}, trap_kernel, 32, 0); }

__global__ void nothing_kernel() {}

TEST(a_fault_leaves_no_trace) {
  expect_fault({"deadlock"}, missing_arrival_kernel, 64, 0);
  CHECK(swap_is_right(swap_kernel<true, true>));
  expect_fault({"__trap"}, trap_kernel, 32, 0);
  run(nothing_kernel, 1, 1, 0);
}

TEST(impossible_launches) {
  const auto launch_nothing = [](dim3 grid, dim3 block, size_t smem_bytes) {
    return int(launch(nothing_kernel, grid, block, smem_bytes, nullptr));
  };
  CHECK_EQ(launch_nothing(1, 1024, simt::kMaxDynamicSmem), int(cudaSuccess));
  CHECK_EQ(launch_nothing(1, 1025, 0), int(cudaErrorInvalidConfiguration));
  CHECK_EQ(launch_nothing(0, 32, 0), int(cudaErrorInvalidConfiguration));
  CHECK_EQ(launch_nothing(dim3(1, 65536), 32, 0), int(cudaErrorInvalidConfiguration));
  CHECK_EQ(launch_nothing(1, 32, simt::kMaxDynamicSmem + 1), int(cudaErrorInvalidValue));
  CHECK_EQ(int(launch_cooperative(nothing_kernel, 5, 32, 0, nullptr)),
           int(cudaErrorCooperativeLaunchTooLarge));
}

// Every thread takes the next ticket: the schedule itself, as a result.
__global__ void ticket_kernel(int* counter, int* tickets) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  tickets[i] = atomicAdd(counter, 1);
  __syncthreads();
  tickets[i] += 1000 * atomicAdd(counter, 1);
}

std::vector<int> schedule(uint64_t seed) {
  simt::set_seed(seed);
  Buffer<int> counter(1), tickets(3 * 96);
  counter[0] = 0;
  run(ticket_kernel, 3, 96, 0, counter.data(), tickets.data());
  return std::vector<int>(tickets.data(), tickets.data() + tickets.size());
}

TEST(the_seed_decides_the_schedule) {
  std::set<std::vector<int>> schedules;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    const std::vector<int> once = schedule(seed);
    CHECK(once == schedule(seed));
    schedules.insert(once);
  }
  CHECK_EQ(schedules.size(), size_t(kSeeds));
}

}  // namespace bigkern
