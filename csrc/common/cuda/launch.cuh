// Launching a kernel, and asking what the compiler made of it.
//
// A launcher calls launch() with raw arguments and a stream and returns the error code it gets:
//
//   return launch(adam_kernel<bf16>, dim3(blocks), dim3(256), 0, stream, params, count);
//
// Nothing here allocates device memory, synchronises or touches the default stream, so a launch
// can be captured in a CUDA graph. Under BIGKERN_SIMT the emulator runs the grid to completion
// before launch() returns, and cudaGetErrorString() tells what fault it found.
#pragma once

#include "common/cuda/cuda.cuh"
#include "common/kernel_info.h"

#if !defined(BIGKERN_SIMT)
#include <map>
#include <mutex>
#include <utility>
#endif

#include <tuple>

namespace bigkern {

#if defined(BIGKERN_SIMT)

namespace detail {
template <class... P, class... A>
cudaError_t launch(bool cooperative, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem_bytes,
                   cudaStream_t /*stream*/, A... args) {
  static_assert(sizeof...(P) == sizeof...(A), "launch: the kernel takes other arguments");
  const std::tuple<P...> params(static_cast<P>(args)...);
  const auto body = [&] { std::apply(kernel, params); };
  const auto call = [](const void* context) { (*static_cast<decltype(&body)>(context))(); };
  return simt::run_grid(
      {reinterpret_cast<const void*>(kernel), grid, block, smem_bytes, cooperative, call, &body});
}
}  // namespace detail

template <class... P>
KernelInfo kernel_info(const char* name, void (*)(P...), size_t dynamic_smem) {
  return KernelInfo{name, 0, 0, 0, int(dynamic_smem), simt::kMaxThreads};
}

inline cudaError_t multiprocessor_count(int* count) {
  *count = simt::kMultiprocessors;
  return cudaSuccess;
}

inline cudaError_t max_dynamic_smem(int* bytes) {
  *bytes = int(simt::kMaxDynamicSmem);
  return cudaSuccess;
}

inline cudaError_t clear(void* memory, size_t bytes, cudaStream_t /*stream*/) {
  memset(memory, 0, bytes);
  return cudaSuccess;
}

#else

namespace detail {

// CUDA grants more than 48 KiB of dynamic shared memory only to kernels that ask. The request is
// made once for each kernel and device, and again only for a larger size; it is no stream
// operation, so it is legal during graph capture.
inline cudaError_t reserve_dynamic_smem(const void* kernel, size_t bytes) {
  constexpr size_t kGrantedToAll = 48 * 1024;
  if (bytes <= kGrantedToAll) return cudaSuccess;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;

  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> granted;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& known = granted[{kernel, device}];
  if (bytes <= known) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error == cudaSuccess) known = bytes;
  return error;
}

template <class... P, class... A>
cudaError_t launch(bool cooperative, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem_bytes,
                   cudaStream_t stream, A... args) {
  static_assert(sizeof...(P) == sizeof...(A), "launch: the kernel takes other arguments");
  const void* function = reinterpret_cast<const void*>(kernel);
  const cudaError_t error = reserve_dynamic_smem(function, smem_bytes);
  if (error != cudaSuccess) return error;

  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  std::tuple<P...> params(static_cast<P>(args)...);
  return std::apply(
      [&](P&... param) {
        // The trailing null keeps the array legal for a kernel without parameters.
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(&param))..., nullptr};
        const cudaError_t launched = cudaLaunchKernelExC(&config, function, pointers);
        const cudaError_t pending = cudaGetLastError();
        return launched != cudaSuccess ? launched : pending;
      },
      params);
}

}  // namespace detail

template <class... P>
KernelInfo kernel_info(const char* name, void (*kernel)(P...), size_t dynamic_smem) {
  cudaFuncAttributes attributes = {};
  if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) != cudaSuccess) {
    cudaGetLastError();  // No device, or no code for it: report zeros, leave no error behind.
  }
  return KernelInfo{name,
                    attributes.numRegs,
                    int(attributes.localSizeBytes),
                    int(attributes.sharedSizeBytes),
                    int(dynamic_smem),
                    attributes.maxThreadsPerBlock};
}

namespace detail {
inline cudaError_t device_attribute(cudaDeviceAttr attribute, int* value) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(value, attribute, device) : error;
}
}  // namespace detail

// The current device's number of multiprocessors, for kernels that size their grid by it.
inline cudaError_t multiprocessor_count(int* count) {
  return detail::device_attribute(cudaDevAttrMultiProcessorCount, count);
}

// The most dynamic shared memory, in bytes, that a block can have on the current device.
inline cudaError_t max_dynamic_smem(int* bytes) {
  return detail::device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, bytes);
}

// Sets memory to zero, in the order of the stream.
inline cudaError_t clear(void* memory, size_t bytes, cudaStream_t stream) {
  return cudaMemsetAsync(memory, 0, bytes, stream);
}

#endif

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem_bytes,
                   cudaStream_t stream, A... args) {
  return detail::launch(false, kernel, grid, block, smem_bytes, stream, args...);
}

// The same for a kernel whose blocks wait for each other: all of them run at once, or the launch
// fails.
template <class... P, class... A>
cudaError_t launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem_bytes,
                               cudaStream_t stream, A... args) {
  return detail::launch(true, kernel, grid, block, smem_bytes, stream, args...);
}

}  // namespace bigkern
