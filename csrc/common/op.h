// What every op.cpp shares: the one place, with the op.cpp files themselves, where torch is
// included.
//
// The binding uses torch's stable ABI alone, so that one build serves several torch versions.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/dropout.h"
#include "common/dtypes.h"
#include "common/parallel.h"

#ifdef BIGKERN_CUDA
#include "common/launch_error.h"
#endif

namespace bigkern {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return Dtype::f32;
    case torch::headeronly::ScalarType::BFloat16:
      return Dtype::bf16;
    case torch::headeronly::ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

// The address of an optional tensor's data, null where there is no tensor.
inline const void* data_or_null(const OptionalTensor& x) {
  return x.has_value() ? x->const_data_ptr() : nullptr;
}

// x itself, or a contiguous copy.
inline Tensor dense(const Tensor& x) { return torch::stable::contiguous(x); }
inline OptionalTensor dense(const OptionalTensor& x) {
  return x.has_value() ? OptionalTensor(torch::stable::contiguous(*x)) : std::nullopt;
}

// An uninitialised tensor of x's dtype and device.
inline Tensor empty(const Tensor& x, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(x, sizes);
}

inline Tensor empty_f32(const Tensor& x, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(x, sizes, torch::headeronly::ScalarType::Float);
}

inline Tensor empty_bytes(const Tensor& x, size_t bytes) {
  return torch::stable::new_empty(x, {static_cast<int64_t>(bytes)},
                                  torch::headeronly::ScalarType::Byte);
}

// The generator of a key that Python drew, and the probability of dropping; without a key, no
// dropout.
inline Dropout dropout_of(const OptionalTensor& key, double p) {
  STD_TORCH_CHECK(key.has_value() || p == 0, "dropout needs a dropout_key");
  if (!key.has_value()) return {0, 0, 0, 1.0f};
  STD_TORCH_CHECK(key->scalar_type() == torch::headeronly::ScalarType::Long && key->is_cpu() &&
                      key->numel() == 2 && key->is_contiguous(),
                  "dropout_key must be two int64 numbers on the CPU");
  STD_TORCH_CHECK(p >= 0 && p < 1, "dropout_p must be in [0, 1), not ", p);
  const int64_t* keys = static_cast<const int64_t*>(key->const_data_ptr());
  const double threshold = std::min(std::nearbyint(p * 4294967296.0), 4294967295.0);
  return {static_cast<uint32_t>(keys[0]), static_cast<uint32_t>(keys[1]),
          static_cast<uint32_t>(threshold), static_cast<float>(1 / (1 - p))};
}

// torch's own thread pool, behind the torch-free interface that the CPU kernels take.
inline Parallel torch_parallel() {
  Parallel parallel;
  parallel.threads = static_cast<int>(torch::stable::get_num_threads());
  parallel.run = [](int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
    torch::stable::parallel_for(begin, end, grain,
                                [body, context](int64_t b, int64_t e) { body(b, e, context); });
  };
  return parallel;
}

#ifdef BIGKERN_CUDA
// Run a launcher on x's device and torch's current stream; a failed launch names the op. Under the
// host emulator (BIGKERN_SIMT) there is neither device nor stream.
template <class Launch>
void launch_on_device([[maybe_unused]] const Tensor& x, const char* op, const Launch& launch) {
#ifdef BIGKERN_SIMT
  const int status = launch(nullptr);
#else
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const int status = launch(stream);
#endif
  STD_TORCH_CHECK(status == 0, op, ": kernel launch failed: ", launch_error(status));
}
#endif

}  // namespace bigkern
