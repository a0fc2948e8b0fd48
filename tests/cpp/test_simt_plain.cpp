// Mistakes that the emulator catches by itself, where AddressSanitizer would have other means (see
// test_simt_asan.cpp) or none: these cases are built without it only.
#include <cmath>
#include <string>

#include "check.h"
#include "common/cuda/cuda.cuh"
#include "common/cuda/launch.cuh"
#include "device.h"

namespace bigkern {

template <class T>
__global__ void unwritten_static_kernel(T* out) {
  __shared__ T values[32];
  out[blockIdx.x * 32 + threadIdx.x] = values[threadIdx.x];
  values[threadIdx.x] = 1;  // The next block must not see this.
}

TEST(unwritten_static_smem_is_nan) {
  Buffer<float> out(64);
  for (int i = 0; i < 64; ++i) out[i] = 0;
  run(unwritten_static_kernel<float>, 2, 32, 0, out.data());
  for (int i = 0; i < 64; ++i) CHECK(std::isnan(out[i]));
}

TEST(cooperative_blocks_share_no_static_smem) {
  Buffer<float> out(64);
  const auto kernel = unwritten_static_kernel<float>;
  CHECK_EQ(int(launch_cooperative(kernel, 2, 32, 0, nullptr, out.data())),
           int(cudaErrorLaunchFailure));
  const std::string report = cudaGetErrorString(cudaErrorLaunchFailure);
  CHECK(report.find("cooperative kernel with __shared__") != std::string::npos);
}

__global__ void write_dynamic_kernel(int index) { dynamic_smem<float>()[index] = 0; }

TEST(write_outside_dynamic_smem) {
  run(write_dynamic_kernel, 1, 1, 64, 15);
  for (int index : {-1, 16}) {
    const cudaError_t error = launch(write_dynamic_kernel, 1, 1, 64, nullptr, index);
    CHECK_EQ(int(error), int(cudaErrorLaunchFailure));
    const std::string report = cudaGetErrorString(error);
    CHECK(report.find("outside the dynamic shared memory of 64 bytes") != std::string::npos);
  }
}

}  // namespace bigkern
