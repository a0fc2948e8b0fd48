// The Adam update and the norm of all gradients as torch ops: check, gather the addresses, launch.
#include "common/op.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "adam/adam.h"
#include "adam/dynamic8.h"

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
  require(list.size() == length, name, " must have one tensor a parameter, ", length, ", not ",
          list.size());
}

void check_place(const Tensor& x, const Tensor& param, const char* name, size_t i) {
  require(x.is_cpu() == param.is_cpu() && x.get_device_index() == param.get_device_index(), name,
          "[", i, "] must be on params' device");
  require(in_storage(x), name, "[", i, "] must lie in its storage, which is too small for it");
}

// The address of a tensor that lies as its parameter does and is updated there; `like` has its
// dtype.
void* updated(const Tensor& x, const Tensor& like, const Tensor& param, const char* name,
              size_t i) {
  require(x.scalar_type() == like.scalar_type(), name, "[", i,
          "] must have the dtype of the rest of its list, and grads that of params");
  check_place(x, param, name, i);
  bool same_shape = x.dim() == param.dim();
  for (int64_t d = 0; same_shape && d < x.dim(); ++d) same_shape = x.size(d) == param.size(d);
  require(same_shape, name, "[", i, "] must have params[", i, "]'s shape");
  require(same_layout(x, param), name, "[", i, "] must have params[", i, "]'s strides");
  return x.mutable_data_ptr();
}

// The address of `count` float32 beside a parameter.
float* numbers_of(const Tensor& x, int64_t count, const Tensor& param, const char* name, size_t i) {
  require(dtype_of(x, name) == Dtype::f32 && x.numel() == count && x.is_contiguous(), name, "[", i,
          "] must be ", count, " float32");
  check_place(x, param, name, i);
  return static_cast<float*>(x.mutable_data_ptr());
}

const float* scalar_of(const OptionalTensor& x, const Tensor& param, const char* name) {
  if (!x.has_value()) return nullptr;
  return numbers_of(*x, 1, param, name, 0);
}

// ---- storage ------------------------------------------------------------------------------------

Moments moments_of(const Tensor& exp_avg) {
  if (exp_avg.scalar_type() == torch::headeronly::ScalarType::Byte) return Moments::codes;
  switch (dtype_of(exp_avg, "exp_avgs")) {
    case Dtype::f32:
      return Moments::f32;
    case Dtype::bf16:
      return Moments::bf16;
    default:
      return Moments::f16;
  }
}

Master master_of(const OptionalTensor& master, Dtype dtype) {
  if (!master.has_value()) return Master::none;
  if (master->scalar_type() == torch::headeronly::ScalarType::Short) {
    require(dtype == Dtype::bf16, "masters of int16 belong to bfloat16 parameters");
    return Master::remainder;
  }
  require(dtype_of(*master, "masters") == Dtype::f32 && dtype != Dtype::f32,
          "masters must be float32 or int16, beside parameters of 16 bits");
  return Master::f32;
}

// Whether a kernel is compiled for this storage, and finds all of it. Empty tensors have no
// address.
void check_stored(const Update& u, const std::vector<Parameter>& parameters) {
  require(u.moments != Moments::f16 || u.dtype == Dtype::f16,
          "exp_avgs must have params' dtype, or be float32, bfloat16 or uint8");
  for (const Parameter& p : parameters) {
    require(p.n == 0 || u.amsgrad == (p.vmax != nullptr),
            "max_exp_avg_sqs must have one tensor a parameter with amsgrad, and none without");
  }
}

OptionalTensor first_of(const TensorList& list) {
  return list.empty() ? std::nullopt : OptionalTensor(list[0]);
}

// ---- lists as addresses -------------------------------------------------------------------------

struct State {
  Arguments& in;
  TensorList exp_avgs = in.list(), exp_avg_sqs = in.list(), max_exp_avg_sqs = in.list();
  TensorList state_steps = in.list(), masters = in.list();
  TensorList exp_avg_scales = in.list(), exp_avg_sq_scales = in.list();
};

// Checks the lists against each other and gathers their addresses, all but those of the gradients.
std::vector<Parameter> gather(const TensorList& params, const State& x) {
  const size_t count = params.size();
  const bool amsgrad = !x.max_exp_avg_sqs.empty(), mastered = !x.masters.empty();
  const bool codes =
      count > 0 && !x.exp_avgs.empty() && moments_of(x.exp_avgs[0]) == Moments::codes;
  check_length(x.exp_avgs, "exp_avgs", count);
  check_length(x.exp_avg_sqs, "exp_avg_sqs", count);
  check_length(x.max_exp_avg_sqs, "max_exp_avg_sqs", amsgrad ? count : 0);
  check_length(x.state_steps, "state_steps", count);
  check_length(x.masters, "masters", mastered ? count : 0);
  check_length(x.exp_avg_scales, "exp_avg_scales", codes ? count : 0);
  check_length(x.exp_avg_sq_scales, "exp_avg_sq_scales", codes ? count : 0);
  require(!(codes && amsgrad), "amsgrad must be false with 8-bit moments");
  std::vector<Parameter> parameters(count);
  int64_t before = 0;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& param = params[i];
    require(param.scalar_type() == params[0].scalar_type(), "params[", i,
            "] must have params[0]'s dtype");
    check_place(param, params[0], "params", i);
    require(dense(param), "params[", i, "] must be dense in memory");
    const auto moment = [&](const TensorList& list, const char* name) {
      return updated(list[i], x.exp_avgs[0], param, name, i);
    };
    Parameter& to = parameters[i];
    to = {};
    to.p = param.mutable_data_ptr();
    to.m = moment(x.exp_avgs, "exp_avgs");
    to.v = moment(x.exp_avg_sqs, "exp_avg_sqs");
    if (amsgrad) to.vmax = moment(x.max_exp_avg_sqs, "max_exp_avg_sqs");
    if (mastered) to.master = updated(x.masters[i], x.masters[0], param, "masters", i);
    to.n = param.numel();
    if (codes) {
      const int64_t blocks = (to.n + kBlock - 1) / kBlock;
      to.m_scale = numbers_of(x.exp_avg_scales[i], blocks, param, "exp_avg_scales", i);
      to.v_scale = numbers_of(x.exp_avg_sq_scales[i], blocks, param, "exp_avg_sq_scales", i);
    }
    to.step = numbers_of(x.state_steps[i], 1, param, "state_steps", i);
    to.before = before;
    before += to.n;
  }
  return parameters;
}

struct Hyper {
  Arguments& in;
  double lr = in.real(), beta1 = in.real(), beta2 = in.real(), eps = in.real();
  double weight_decay = in.real();
  bool decoupled = in.flag(), amsgrad = in.flag(), maximize = in.flag(), zero_grads = in.flag();
  double max_norm = in.real();
  std::optional<int64_t> seed = in.optional_integer();
  OptionalTensor grad_scale = in.optional(), found_inf = in.optional();
  OptionalTensor lr_tensor = in.optional(), grad_norm = in.optional();

  Update update(const Tensor& param, const Tensor& exp_avg, const OptionalTensor& master) const {
    Update u = {};
    u.dtype = dtype_of(param, "params");
    u.moments = moments_of(exp_avg);
    u.master = master_of(master, u.dtype);
    u.lr = lr, u.beta1 = beta1, u.beta2 = beta2, u.eps = eps, u.weight_decay = weight_decay;
    u.max_norm = max_norm;
    u.decoupled = decoupled, u.amsgrad = amsgrad, u.maximize = maximize, u.zero_grads = zero_grads;
    u.stochastic = seed.has_value();
    u.seed = uint64_t(seed.value_or(0));
    u.grad_scale = scalar_of(grad_scale, param, "grad_scale");
    u.found_inf = scalar_of(found_inf, param, "found_inf");
    u.lr_tensor = scalar_of(lr_tensor, param, "lr_tensor");
    u.grad_norm = scalar_of(grad_norm, param, "grad_norm");
    return u;
  }
};

struct Cpu {
  static void update(const Update& call, const std::vector<Parameter>& parameters, const Tensor&) {
    cpu::update(call, parameters.data(), int64_t(parameters.size()), torch_parallel());
  }

  static void grad_norm(const std::vector<Parameter>& grads, const Tensor& like, float* norm) {
    const Dtype dtype = dtype_of(like, "grads");
    *norm = cpu::grad_norm(dtype, grads.data(), int64_t(grads.size()), torch_parallel());
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

  static void grad_norm(const std::vector<Parameter>& grads, const Tensor& like, float* norm) {
    const Dtype dtype = dtype_of(like, "grads");
    const int64_t count = int64_t(grads.size());
    Tensor workspace = empty_f32(like, {cuda::grad_norm_workspace(grads.data(), count)});
    auto* sums = static_cast<float*>(workspace.mutable_data_ptr());
    launch_on_device(like, "grad_norm", [&](void* stream) {
      return cuda::grad_norm(dtype, grads.data(), count, sums, norm, stream);
    });
  }
};
#endif

struct AdamCall {
  Arguments& in;
  TensorList params = in.list(), grads = in.list();
  State state{in};
  Hyper hyper{in};
};

template <class Device>
void adam(const AdamCall& call) {
  const TensorList &params = call.params, &grads = call.grads;
  if (params.empty()) return;
  check_length(grads, "grads", params.size());
  std::vector<Parameter> parameters = gather(params, call.state);
  for (size_t i = 0; i < params.size(); ++i)
    parameters[i].g = updated(grads[i], params[0], params[i], "grads", i);
  const State& state = call.state;
  const Update u = call.hyper.update(params[0], state.exp_avgs[0], first_of(state.masters));
  check_stored(u, parameters);
  Device::update(u, parameters, params[0]);
}

// ---- the same from a table of addresses ---------------------------------------------------------
//
// Unpacking five lists of tensors costs 0.7 us a parameter, more than the update of a small one.
// The optimizer packs them once, and hands over the table while every address in it still holds.

constexpr int64_t kRow = sizeof(Parameter) / sizeof(int64_t);
static_assert(sizeof(Parameter) == kRow * sizeof(int64_t), "a row of the table is one Parameter");

struct PackCall {
  Arguments& in;
  TensorList params = in.list();
  State state{in};
};

// [count, kRow] int64 on the CPU.
Tensor adam_pack(const PackCall& call) {
  const std::vector<Parameter> parameters = gather(call.params, call.state);
  const std::vector<int64_t> sizes = {int64_t(parameters.size()), kRow};
  Tensor table = torch::stable::empty(sizes, torch::headeronly::ScalarType::Long);
  std::memcpy(table.mutable_data_ptr(), parameters.data(), parameters.size() * sizeof(Parameter));
  return table;
}

// The rows of a table with the gradients' addresses, [count] int64 on the CPU, laid out like their
// parameters. The caller answers for every address.
std::vector<Parameter> unpack(const Tensor& table, const Tensor& grads) {
  const auto holds_numbers = [](const Tensor& x) {
    return x.is_cpu() && x.is_contiguous() && in_storage(x) &&
           x.scalar_type() == torch::headeronly::ScalarType::Long;
  };
  require(holds_numbers(table) && table.dim() == 2 && table.size(1) == kRow,
          "table must come from adam_pack");
  require(holds_numbers(grads) && grads.numel() == table.size(0),
          "grads must be one int64 a parameter");
  const auto* rows = static_cast<const Parameter*>(table.const_data_ptr());
  const auto* addresses = static_cast<const int64_t*>(grads.const_data_ptr());
  std::vector<Parameter> parameters(rows, rows + table.size(0));
  for (size_t i = 0; i < parameters.size(); ++i) {
    parameters[i].g = reinterpret_cast<void*>(addresses[i]);
    require(parameters[i].n == 0 || addresses[i] != 0, "grads[", i,
            "] must lie in its storage, which is too small for it");
  }
  return parameters;
}

struct PackedCall {
  Arguments& in;
  Tensor param = in.tensor(), exp_avg = in.tensor();  // any of theirs, as is master
  OptionalTensor master = in.optional();
  Tensor table = in.tensor(), grads = in.tensor();
  Hyper hyper{in};
};

template <class Device>
void adam_packed(const PackedCall& call) {
  const std::vector<Parameter> parameters = unpack(call.table, call.grads);
  if (parameters.empty()) return;
  const Update u = call.hyper.update(call.param, call.exp_avg, call.master);
  check_stored(u, parameters);
  Device::update(u, parameters, call.param);
}

// ---- the norm of all gradients ------------------------------------------------------------------

template <class Device>
Tensor norm_of(const std::vector<Parameter>& grads, const Tensor& like) {
  Tensor norm = empty_f32(like, {});
  Device::grad_norm(grads, like, static_cast<float*>(norm.mutable_data_ptr()));
  return norm;
}

struct NormCall {
  Arguments& in;
  TensorList grads = in.list();
};

template <class Device>
Tensor grad_norm(const NormCall& call) {
  const TensorList& grads = call.grads;
  require(!grads.empty(), "grads must not be empty");
  std::vector<Parameter> parameters(grads.size());
  int64_t before = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    require(grads[i].scalar_type() == grads[0].scalar_type(), "grads[", i,
            "] must have grads[0]'s dtype");
    require(dense(grads[i]), "grads[", i, "] must be dense in memory");
    check_place(grads[i], grads[0], "grads", i);
    parameters[i] = {};
    parameters[i].g = const_cast<void*>(grads[i].const_data_ptr());
    parameters[i].n = grads[i].numel();
    parameters[i].before = before;
    before += parameters[i].n;
  }
  return norm_of<Device>(parameters, grads[0]);
}

struct PackedNormCall {
  Arguments& in;
  Tensor param = in.tensor(), table = in.tensor(), grads = in.tensor();
};

template <class Device>
Tensor grad_norm_packed(const PackedNormCall& call) {
  return norm_of<Device>(unpack(call.table, call.grads), call.param);
}

template <class Device, class Library>
void implement(Library& m) {
  m.impl("adam", &boxed<adam<Device>>);
  m.impl("adam_pack", &boxed<adam_pack>);
  m.impl("adam_packed", &boxed<adam_packed<Device>>);
  m.impl("grad_norm", &boxed<grad_norm<Device>>);
  m.impl("grad_norm_packed", &boxed<grad_norm_packed<Device>>);
}

}  // namespace

#ifdef BIGKERN_SIMT
STABLE_TORCH_LIBRARY_IMPL(bigkern_simt, CPU, m) { implement<Cuda>(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(bigkern_native, CPU, m) { implement<Cpu>(m); }
#ifdef BIGKERN_CUDA
STABLE_TORCH_LIBRARY_IMPL(bigkern_native, CUDA, m) { implement<Cuda>(m); }
#endif
#endif

}  // namespace bigkern::adam
