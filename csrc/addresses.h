// Where the tensors of a Python list lie, without torch: through DLPack's exchange API, a table of
// C functions that torch.Tensor carries since torch 2.10.
//
//   object -> tensor -> storage -> address        each in a line of memory of its own
//
// It is for lists of thousands of small tensors, whose update takes less time than asking each of
// them from Python. What takes the time here is waiting for memory.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace bigkern {

// As dlpack.h, version 1, lays them out.
struct DlTensor {
  void* data;
  int32_t device_type, device;
  int32_t ndim;
  uint8_t code, bits;  // of the dtype
  uint16_t lanes;
  int64_t *shape, *strides;  // [ndim], the tensor's own
  uint64_t byte_offset;
};

struct DlExchangeApi {
  uint32_t major, minor;
  void* older;
  void *allocate, *from_object, *to_object;
  int (*borrow)(void* object, DlTensor* out);  // 0, or -1 with a Python exception
  void* current_stream;
};

inline const DlExchangeApi* exchange_api() {
  const auto tensor = pybind11::module_::import("torch").attr("Tensor");
  const pybind11::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  void* const found = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (found == nullptr) throw pybind11::error_already_set();
  const auto* const api = static_cast<const DlExchangeApi*>(found);
  if (api->major != 1) throw std::runtime_error("torch's DLPack is not of version 1");
  return api;
}

// Asks for the memory of a tensor that will be read soon. An object begins with its tensor's
// address; were it anything else, memory would be asked for in vain, and no more.
inline void prefetch(const PyObject* object) {
  const char* const tensor = *reinterpret_cast<const char* const*>(object + 1);
  for (int line = 0; line < 3; ++line) __builtin_prefetch(tensor + 64 * line);
}

// Calls f(tensor) for each.
template <class F>
void for_tensors(const pybind11::list& list, const F& f) {
  static const DlExchangeApi* const api = exchange_api();
  constexpr Py_ssize_t kAhead = 16;
  const Py_ssize_t size = PyList_GET_SIZE(list.ptr());
  const auto object = [&](Py_ssize_t i) { return PyList_GET_ITEM(list.ptr(), i); };
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (i + 2 * kAhead < size) __builtin_prefetch(object(i + 2 * kAhead));
    if (i + kAhead < size) prefetch(object(i + kAhead));
    DlTensor tensor;
    if (api->borrow(object(i), &tensor) != 0) throw pybind11::error_already_set();
    f(tensor);
  }
}

// An int64 a tensor.
inline pybind11::bytearray addresses(const pybind11::list& tensors) {
  std::string out;
  out.reserve(tensors.size() * sizeof(void*));
  for_tensors(tensors, [&](const DlTensor& x) {
    out.append(reinterpret_cast<const char*>(&x.data), sizeof x.data);
  });
  return {out.data(), out.size()};
}

// Device, dtype, sizes and strides: the same bytes for lists of tensors that are stored alike. The
// stride of a dimension of one element says nothing.
inline pybind11::bytes layouts(const pybind11::list& tensors) {
  std::string out;
  const auto add = [&](int64_t number) {
    out.append(reinterpret_cast<const char*>(&number), sizeof number);
  };
  for_tensors(tensors, [&](const DlTensor& x) {
    add(int64_t(x.device_type) << 32 | x.device);
    add(int64_t(x.code) << 16 | int64_t(x.bits) << 8 | x.ndim);
    for (int32_t d = 0; d < x.ndim; ++d) {
      add(x.shape[d]);
      add(x.shape[d] > 1 ? x.strides[d] : 0);
    }
  });
  return out;
}

}  // namespace bigkern
