// Accesses out of bounds that must end the process with a report of AddressSanitizer. The build
// gives these cases an executable of their own and expects that report from each of them.
#include "check.h"
#include "common/cuda/cuda.cuh"
#include "common/cuda/launch.cuh"
#include "device.h"

namespace bigkern {

__global__ void write_global_kernel(float* out, int index) { out[index] = 1; }

TEST(dies_of_global_write) {
  Buffer<float> out(32);
  run(write_global_kernel, 1, 1, 0, out.data(), 32);
}

__global__ void read_global_kernel(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x + 1];
}

TEST(dies_of_global_read) {
  Buffer<float> in(32), out(32);
  run(read_global_kernel, 1, 32, 0, in.data(), out.data());
}

__global__ void dynamic_smem_kernel(int index) { dynamic_smem<float>()[index] = 1; }

TEST(dies_past_dynamic_smem) { run(dynamic_smem_kernel, 1, 1, 64, 16); }
TEST(dies_before_dynamic_smem) { run(dynamic_smem_kernel, 1, 1, 64, -1); }

__global__ void static_smem_kernel(float* out, int index) {
  __shared__ float values[16];
  values[index + int(threadIdx.x)] = 1;
  __syncthreads();
  out[threadIdx.x] = values[15 - threadIdx.x];
}

TEST(dies_past_static_smem) {
  Buffer<float> out(16);
  run(static_smem_kernel, 1, 16, 0, out.data(), 1);
}

__global__ void local_array_kernel(float* out, int index) {
  float values[16] = {};
  values[index] = 1;
  for (float value : values) out[0] = value;
}

TEST(dies_past_local_array) {
  Buffer<float> out(1);
  run(local_array_kernel, 1, 1, 0, out.data(), 16);
}

}  // namespace bigkern
