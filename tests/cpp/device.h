// What a test needs to run one kernel both in the emulator and, built by nvcc, on a GPU: memory
// that the host and the kernel see, and a launch that waits.
#pragma once

#include <cstring>

#include "check.h"
#include "common/cuda/launch.cuh"

namespace bigkern {

#if defined(BIGKERN_SIMT)

inline void* allocate(size_t bytes) { return ::operator new(bytes, std::align_val_t(16)); }
inline void release(void* memory) { ::operator delete(memory, std::align_val_t(16)); }
inline cudaError_t synchronize() { return cudaSuccess; }
inline void require_device() {}

#else

inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  CHECK(cudaMallocManaged(&memory, bytes) == cudaSuccess);
  return memory;
}
inline void release(void* memory) { cudaFree(memory); }
inline cudaError_t synchronize() { return cudaDeviceSynchronize(); }

inline void require_device() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) return;
  std::cout << "no CUDA device" << std::endl;
  exit(check::kSkipped);
}

#endif

// An array that kernels can read and write; all its bytes start as 0xff, which is NaN.
template <class T>
class Buffer {
 public:
  explicit Buffer(int size) : size_(size) {
    require_device();
    data_ = static_cast<T*>(allocate(size_t(size) * sizeof(T)));
    memset(static_cast<void*>(data_), 0xff, size_t(size) * sizeof(T));
  }
  ~Buffer() { release(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  int size() const { return size_; }
  T* data() { return data_; }
  T& operator[](int i) { return data_[i]; }

 private:
  int size_;
  T* data_;
};

// Waits for a launch, and fails the test on any error.
inline void finish(cudaError_t error) {
  if (error == cudaSuccess) error = synchronize();
  if (error != cudaSuccess) std::cerr << cudaGetErrorString(error) << "\n";
  CHECK(error == cudaSuccess);
}

template <class... P, class... A>
void run(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem_bytes, A... args) {
  finish(launch(kernel, grid, block, smem_bytes, nullptr, args...));
}

template <class... P, class... A>
void run_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem_bytes, A... args) {
  finish(launch_cooperative(kernel, grid, block, smem_bytes, nullptr, args...));
}

}  // namespace bigkern
