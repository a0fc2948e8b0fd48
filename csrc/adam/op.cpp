// The Adam update as a torch op: check, gather the addresses, launch.
#include "common/op.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "adam/adam.h"

namespace bigkern::adam {
namespace {

using TensorList = std::vector<Tensor>;

// Whether x's elements fill one block of memory, each once, in any order of dimensions.
bool dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) != 1) dims.emplace_back(x.stride(d), x.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Whether the same element of x and of y lies at the same distance from the first one.
bool same_layout(const Tensor& x, const Tensor& y) {
  if (x.is_contiguous() && y.is_contiguous()) return true;
  for (int64_t d = 0; d < y.dim(); ++d) {
    if (y.size(d) > 1 && x.stride(d) != y.stride(d)) return false;
  }
  return true;
}

void check_length(const TensorList& list, const char* name, size_t length) {
  STD_TORCH_CHECK(list.size() == length, name, " must have one tensor a parameter, ", length,
                  ", not ", list.size());
}

// x has its parameter's dtype, device and shape.
void check_like(const Tensor& x, const Tensor& param, const char* name, size_t i) {
  STD_TORCH_CHECK(x.scalar_type() == param.scalar_type(), name, "[", i,
                  "] must have params' dtype");
  STD_TORCH_CHECK(x.is_cpu() == param.is_cpu() && x.get_device_index() == param.get_device_index(),
                  name, "[", i, "] must be on params' device");
  bool same_shape = x.dim() == param.dim();
  for (int64_t d = 0; same_shape && d < x.dim(); ++d) same_shape = x.size(d) == param.size(d);
  STD_TORCH_CHECK(same_shape, name, "[", i, "] must have params[", i, "]'s shape");
}

// The address of a tensor that is updated where it lies.
void* updated(const Tensor& x, const Tensor& param, const char* name, size_t i) {
  check_like(x, param, name, i);
  STD_TORCH_CHECK(same_layout(x, param), name, "[", i, "] must have params[", i, "]'s strides");
  return x.mutable_data_ptr();
}

float* step_of(const Tensor& step, const Tensor& param, size_t i) {
  STD_TORCH_CHECK(dtype_of(step, "state_steps") == Dtype::f32 && step.numel() == 1, "state_steps[",
                  i, "] must be one float32");
  STD_TORCH_CHECK(
      step.is_cpu() == param.is_cpu() && step.get_device_index() == param.get_device_index(),
      "state_steps[", i, "] must be on params' device");
  return static_cast<float*>(step.mutable_data_ptr());
}

const float* scalar_of(const OptionalTensor& x, const Tensor& param, const char* name) {
  if (!x.has_value()) return nullptr;
  STD_TORCH_CHECK(dtype_of(*x, name) == Dtype::f32 && x->numel() == 1, name,
                  " must be one float32");
  STD_TORCH_CHECK(
      x->is_cpu() == param.is_cpu() && x->get_device_index() == param.get_device_index(), name,
      " must be on params' device");
  return static_cast<const float*>(x->const_data_ptr());
}

struct Cpu {
  static void update(const Update& call, const std::vector<Parameter>& parameters, const Tensor&) {
    cpu::update(call, parameters.data(), int64_t(parameters.size()), torch_parallel());
  }
};

#ifdef BIGKERN_CUDA
struct Cuda {
  static void update(const Update& call, const std::vector<Parameter>& parameters,
                     const Tensor& x) {
    launch_on_device(x, "adam", [&](void* stream) {
      return cuda::update(call, parameters.data(), int64_t(parameters.size()), stream);
    });
  }
};
#endif

// Checks the lists against each other and gathers their addresses, all but those of the gradients.
std::vector<Parameter> gather(const TensorList& params, const TensorList& exp_avgs,
                              const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                              const TensorList& state_steps, bool amsgrad) {
  const size_t count = params.size();
  check_length(exp_avgs, "exp_avgs", count);
  check_length(exp_avg_sqs, "exp_avg_sqs", count);
  check_length(max_exp_avg_sqs, "max_exp_avg_sqs", amsgrad ? count : 0);
  check_length(state_steps, "state_steps", count);
  std::vector<Parameter> parameters(count);
  int64_t before = 0;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& param = params[i];
    STD_TORCH_CHECK(param.scalar_type() == params[0].scalar_type() &&
                        param.get_device_index() == params[0].get_device_index(),
                    "params[", i, "] must have the dtype and device of params[0]");
    STD_TORCH_CHECK(dense(param), "params[", i, "] must be dense in memory");
    parameters[i] = {param.mutable_data_ptr(),
                     nullptr,
                     updated(exp_avgs[i], param, "exp_avgs", i),
                     updated(exp_avg_sqs[i], param, "exp_avg_sqs", i),
                     amsgrad ? updated(max_exp_avg_sqs[i], param, "max_exp_avg_sqs", i) : nullptr,
                     step_of(state_steps[i], param, i),
                     param.numel(),
                     before};
    before += param.numel();
  }
  return parameters;
}

template <class Device>
void adam(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
          const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
          const TensorList& state_steps, double lr, double beta1, double beta2, double eps,
          double weight_decay, bool decoupled, bool amsgrad, bool maximize,
          const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
          const OptionalTensor& lr_tensor) {
  if (params.empty()) return;
  check_length(grads, "grads", params.size());
  std::vector<Parameter> parameters =
      gather(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, amsgrad);
  for (size_t i = 0; i < params.size(); ++i)
    parameters[i].g = updated(grads[i], params[i], "grads", i);
  const Tensor& first = params[0];
  const Update call = {dtype_of(first, "params"),
                       lr,
                       beta1,
                       beta2,
                       eps,
                       weight_decay,
                       decoupled,
                       amsgrad,
                       maximize,
                       scalar_of(grad_scale, first, "grad_scale"),
                       scalar_of(found_inf, first, "found_inf"),
                       scalar_of(lr_tensor, first, "lr_tensor")};
  Device::update(call, parameters, first);
}

// ---- the same from a table of addresses
// ------------------------------------------------------------
//
// Unpacking five lists of tensors costs 0.7 us a parameter, more than the update of a small one.
// The optimizer packs them once, and hands over the table while every address in it still holds.

constexpr int64_t kRow = sizeof(Parameter) / sizeof(int64_t);
static_assert(sizeof(Parameter) == kRow * sizeof(int64_t), "a row of the table is one Parameter");

// [count, kRow] int64 on the CPU.
Tensor adam_pack(const TensorList& params, const TensorList& exp_avgs,
                 const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                 const TensorList& state_steps, bool amsgrad) {
  const std::vector<Parameter> parameters =
      gather(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, amsgrad);
  const std::vector<int64_t> sizes = {int64_t(parameters.size()), kRow};
  Tensor table = torch::stable::empty(sizes, torch::headeronly::ScalarType::Long);
  std::memcpy(table.mutable_data_ptr(), parameters.data(), parameters.size() * sizeof(Parameter));
  return table;
}

// like is any of the parameters; grads [count] int64 on the CPU holds the gradients' addresses,
// laid out like their parameters. The caller answers for every address.
template <class Device>
void adam_packed(const Tensor& like, const Tensor& table, const Tensor& grads, double lr,
                 double beta1, double beta2, double eps, double weight_decay, bool decoupled,
                 bool amsgrad, bool maximize, const OptionalTensor& grad_scale,
                 const OptionalTensor& found_inf, const OptionalTensor& lr_tensor) {
  STD_TORCH_CHECK(
      table.is_cpu() && table.is_contiguous() && table.dim() == 2 && table.size(1) == kRow,
      "table must come from adam_pack");
  STD_TORCH_CHECK(grads.is_cpu() && grads.is_contiguous() && grads.numel() == table.size(0) &&
                      grads.scalar_type() == torch::headeronly::ScalarType::Long,
                  "grads must be one int64 a parameter");
  const auto* rows = static_cast<const Parameter*>(table.const_data_ptr());
  const auto* addresses = static_cast<const int64_t*>(grads.const_data_ptr());
  std::vector<Parameter> parameters(rows, rows + table.size(0));
  for (size_t i = 0; i < parameters.size(); ++i)
    parameters[i].g = reinterpret_cast<void*>(addresses[i]);
  const Update call = {dtype_of(like, "like"),
                       lr,
                       beta1,
                       beta2,
                       eps,
                       weight_decay,
                       decoupled,
                       amsgrad,
                       maximize,
                       scalar_of(grad_scale, like, "grad_scale"),
                       scalar_of(found_inf, like, "found_inf"),
                       scalar_of(lr_tensor, like, "lr_tensor")};
  Device::update(call, parameters, like);
}

}  // namespace
}  // namespace bigkern::adam

#ifdef BIGKERN_SIMT
STABLE_TORCH_LIBRARY_IMPL(bigkern_simt, CPU, m) {
  m.impl("adam", TORCH_BOX(&bigkern::adam::adam<bigkern::adam::Cuda>));
  m.impl("adam_pack", TORCH_BOX(&bigkern::adam::adam_pack));
  m.impl("adam_packed", TORCH_BOX(&bigkern::adam::adam_packed<bigkern::adam::Cuda>));
}
#else
STABLE_TORCH_LIBRARY_IMPL(bigkern_native, CPU, m) {
  m.impl("adam", TORCH_BOX(&bigkern::adam::adam<bigkern::adam::Cpu>));
  m.impl("adam_pack", TORCH_BOX(&bigkern::adam::adam_pack));
  m.impl("adam_packed", TORCH_BOX(&bigkern::adam::adam_packed<bigkern::adam::Cpu>));
}
#ifdef BIGKERN_CUDA
STABLE_TORCH_LIBRARY_IMPL(bigkern_native, CUDA, m) {
  m.impl("adam", TORCH_BOX(&bigkern::adam::adam<bigkern::adam::Cuda>));
  m.impl("adam_pack", TORCH_BOX(&bigkern::adam::adam_pack));
  m.impl("adam_packed", TORCH_BOX(&bigkern::adam::adam_packed<bigkern::adam::Cuda>));
}
#endif
#endif
