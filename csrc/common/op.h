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
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/dropout.h"
#include "common/dtypes.h"
#include "common/parallel.h"

#ifdef BIGKERN_CUDA
#include "common/cuda/launch_error.h"
#endif

namespace bigkern {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Throws what becomes Python's RuntimeError, of a message that begins with the argument's name:
// torch's own macro would put our function and file before it.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

// ---- calls: an op's arguments as one struct -----------------------------------------------------

namespace {  // hidden from other libraries, as torch's Tensor is

// The arguments of a call, taken one after the other. An op's struct names each of them once, in
// the schema's order, which is the order in which its fields are initialised:
//
//   struct Call {
//     Arguments& in;
//     Tensor x = in.tensor(), weight = in.tensor();
//     OptionalTensor bias = in.optional();
//   };
class Arguments {
 public:
  Arguments(const StableIValue* begin, uint64_t count) : next_(begin), end_(begin + count) {}

  Tensor tensor() { return take<Tensor>(); }
  OptionalTensor optional() { return take<OptionalTensor>(); }
  std::vector<Tensor> list() { return take<std::vector<Tensor>>(); }
  double real() { return take<double>(); }
  int64_t integer() { return take<int64_t>(); }
  std::optional<int64_t> optional_integer() { return take<std::optional<int64_t>>(); }
  bool flag() { return take<bool>(); }
  std::vector<bool> flags() { return take<std::vector<bool>>(); }
  std::string text() {  // torch's own conversion leaks it
    const auto handle = take<StringHandle>();
    const char* characters = nullptr;
    size_t length = 0;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &characters));
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    const std::string text(characters, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
  bool taken() const { return next_ == end_; }

 private:
  // Whoever takes a value owns it.
  template <class T>
  T take() {
    require(!taken(), "the kernel takes more arguments than the schema has");
    return torch::stable::detail::to<T>(*next_++);
  }

  const StableIValue *next_, *end_;
};

template <class... Results>
void box(StableIValue* stack, const std::tuple<Results...>& results) {
  torch::stable::detail::box_from_tuple(stack, results);
}
template <class Result>
void box(StableIValue* stack, const Result& result) {
  *stack = torch::stable::detail::from(result);
}

template <class Result, class Call>
void run(Result (*function)(Call&), StableIValue* stack, uint64_t count) {
  Arguments in(stack, count);
  Call call{in};
  require(in.taken(), "the kernel takes fewer arguments than the schema has");
  if constexpr (std::is_void_v<Result>) {
    function(call);
  } else {
    box(stack, function(call));
  }
}

// What torch calls to run a function that takes such a struct.
template <auto function>
void boxed(StableIValue* stack, uint64_t count, uint64_t) {
  run(function, stack, count);
}

}  // namespace

// ---- checks: what is done to every tensor of a call before its memory is touched ----------------

using Dims = torch::headeronly::IntHeaderOnlyArrayRef;

inline Dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return Dtype::f32;
    case torch::headeronly::ScalarType::BFloat16:
      return Dtype::bf16;
    case torch::headeronly::ScalarType::Half:
      return Dtype::f16;
    default:
      fail(name, " must be float32, bfloat16 or float16");
  }
}

// Whether all of x lies in its storage, which may have been resized since x was made.
inline bool in_storage(const Tensor& x) {
  const Dims sizes = x.sizes(), strides = x.strides();
  int64_t last = x.storage_offset();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return true;
    last += (sizes[d] - 1) * strides[d];
  }
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &bytes));
  return (last + 1) * static_cast<int64_t>(x.element_size()) <= bytes;
}

inline void check_storage(const Tensor& x, const char* name) {
  require(in_storage(x), name, " must lie in its storage, which is too small for it");
}

namespace {  // hidden from other libraries, as torch's Tensor is

// The tensor that the others of a call are held to.
struct First {
  const Tensor& tensor;
  const char* name;
  Dtype dtype;

  First(const Tensor& x, const char* name) : tensor(x), name(name), dtype(dtype_of(x, name)) {
    check_storage(x, name);
  }
};

}  // namespace

inline void check_place(const Tensor& x, const char* name, const First& first) {
  require(x.is_cpu() == first.tensor.is_cpu() &&
              x.get_device_index() == first.tensor.get_device_index(),
          name, " must be on ", first.name, "'s device");
  check_storage(x, name);
}

inline std::string text_of(Dims sizes) {
  std::string text = "[";
  for (size_t d = 0; d < sizes.size(); ++d) text += (d == 0 ? "" : ", ") + std::to_string(sizes[d]);
  return text + "]";
}

inline void check_sizes(const Tensor& x, const char* name, Dims sizes) {
  if (x.sizes() == sizes) return;
  fail(name, " must have shape ", text_of(sizes), ", not ", text_of(x.sizes()));
}

// A tensor of such a shape and of the first one's dtype, where there is one.
inline void check(const OptionalTensor& x, const char* name, const First& first, Dims sizes) {
  if (!x.has_value()) return;
  require(dtype_of(*x, name) == first.dtype, name, " must have ", first.name, "'s dtype");
  check_place(*x, name, first);
  check_sizes(*x, name, sizes);
}

inline void check_f32(const OptionalTensor& x, const char* name, const First& first, Dims sizes) {
  if (!x.has_value()) return;
  require(dtype_of(*x, name) == Dtype::f32, name, " must be float32");
  check_place(*x, name, first);
  check_sizes(*x, name, sizes);
}

// ---- tensors as kernels take them ---------------------------------------------------------------

// The address of an optional tensor's data, null where there is no tensor.
inline const void* data_or_null(const OptionalTensor& x) {
  return x.has_value() ? x->const_data_ptr() : nullptr;
}

// Where a kernel writes, null where there is no tensor.
inline void* out(const Tensor& x) { return x.mutable_data_ptr(); }
inline void* out(const OptionalTensor& x) {
  return x.has_value() ? x->mutable_data_ptr() : nullptr;
}

// x itself, or a contiguous copy.
inline Tensor dense(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}
inline OptionalTensor dense(const OptionalTensor& x) {
  return x.has_value() ? OptionalTensor(dense(*x)) : std::nullopt;
}

// An uninitialised tensor on x's device. Straight from the allocator: through the dispatcher, which
// looks ops up by their names, allocating would cost small calls more than their kernel.
inline Tensor empty_strided(const Tensor& x, Dims sizes, Dims strides, int32_t dtype) {
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype, device,
                                                  x.get_device_index(), &handle));
  return Tensor(handle);
}

inline int32_t torch_dtype_of(const Tensor& x) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

inline Tensor empty_contiguous(const Tensor& x, Dims sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;)
    strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  return empty_strided(x, sizes, strides, dtype);
}

// The same of x's dtype.
inline Tensor empty(const Tensor& x, const std::vector<int64_t>& sizes) {
  return empty_contiguous(x, sizes, torch_dtype_of(x));
}

inline Tensor empty_f32(const Tensor& x, const std::vector<int64_t>& sizes) {
  return empty_contiguous(x, sizes, aoti_torch_dtype_float32());
}

inline Tensor empty_bytes(const Tensor& x, size_t bytes) {
  return empty_contiguous(x, {static_cast<int64_t>(bytes)}, aoti_torch_dtype_uint8());
}

// The generator of a key that Python drew, and the probability of dropping; without a key, no
// dropout.
inline Dropout dropout_of(const OptionalTensor& key, double p) {
  require(key.has_value() || p == 0, "dropout needs a dropout_key");
  if (!key.has_value()) return {0, 0, 0, 1.0f};
  require(key->scalar_type() == torch::headeronly::ScalarType::Long && key->is_cpu() &&
              key->numel() == 2 && key->is_contiguous() && in_storage(*key),
          "dropout_key must be two int64 numbers on the CPU");
  require(p >= 0 && p < 1, "dropout_p must be in [0, 1), not ", p);
  const int64_t* keys = static_cast<const int64_t*>(key->const_data_ptr());
  const auto is_32_bits = [](int64_t word) { return word == static_cast<uint32_t>(word); };
  require(is_32_bits(keys[0]) && is_32_bits(keys[1]),
          "dropout_key must be two numbers within 0 and 2^32, not ", keys[0], " and ", keys[1]);
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
  require(status == 0, op, ": kernel launch failed: ", launch_error(status));
}
#endif

}  // namespace bigkern
