// Recurrent layers as torch ops, a layer on the CPU, a scan on a GPU: check, allocate, launch.
#include "common/op.h"

#include "common/cpu/team.h"
#include "recurrent/recurrent.h"

namespace bigkern::recurrent {
namespace {

#ifndef BIGKERN_SIMT
// Threads that wait for each other at every step: each needs a core of its own.
Parallel team_parallel() {
  Parallel parallel = torch_parallel();
  parallel.threads = std::min(parallel.threads, cores());
  return parallel;
}

struct Cpu {
  // A scan alone is a layer whose gates have been projected.
  static Layer layer_of(const Scan& call) {
    Layer p = {};
    p.of = call.of, p.projected = call.gates, p.gates = call.save ? call.gates : nullptr;
    p.w_hh[0] = call.w_hh[0], p.w_hh[1] = call.w_hh[1], p.bias_n = call.bias_n;
    p.h0 = call.h0, p.c0 = call.c0, p.zoneout = call.zoneout;
    p.y = call.y, p.hn = call.hn, p.cn = call.cn, p.reserve = call.reserve;
    p.workspace = call.workspace;
    return p;
  }
  static size_t workspace(const Scan& call) {
    return cpu::layer_workspace(layer_of(call), team_parallel().threads);
  }
  static void launch(const Scan& call, const Tensor&) {
    cpu::layer(layer_of(call), team_parallel());
  }
  static size_t workspace(const ScanBackward& call) {
    return cpu::scan_backward_workspace(call, team_parallel().threads);
  }
  static void launch(const ScanBackward& call, const Tensor&) {
    cpu::scan_backward(call, team_parallel());
  }
};
#endif

#ifdef BIGKERN_CUDA
struct Cuda {
  static size_t workspace(const Scan& call) { return cuda::scan_workspace(call); }
  static size_t workspace(const ScanBackward& call) { return cuda::scan_backward_workspace(call); }
  static void launch(const Scan& call, const Tensor& gates) {
    launch_on_device(gates, "recurrent", [&](void* stream) { return cuda::scan(call, stream); });
  }
  static void launch(const ScanBackward& call, const Tensor& gates) {
    launch_on_device(gates, "recurrent_backward",
                     [&](void* stream) { return cuda::scan_backward(call, stream); });
  }
};
#endif

Mode mode_of(const std::string& mode) {
  if (mode == "LSTM") return Mode::lstm;
  if (mode == "GRU") return Mode::gru;
  if (mode == "RNN_TANH") return Mode::rnn_tanh;
  require(mode == "RNN_RELU", "mode must be LSTM, GRU, RNN_TANH or RNN_RELU, not ", mode);
  return Mode::rnn_relu;
}

// The sizes of a call whose steps have N rows in all, and where its batch sizes are read.
struct Steps {
  First first;
  Sizes of;
  Tensor batch_sizes;  // keeps a copy on the device alive

  Steps(const First& first, int64_t N, const Tensor& h0, const OptionalTensor& batch_sizes_,
        const std::string& mode)
      : first(first), batch_sizes(h0) {
    of.dtype = first.dtype;
    of.mode = mode_of(mode);
    require(h0.dim() == 3 && h0.numel() > 0, "h0 must be [D, B, H], and not empty");
    of.D = h0.size(0), of.B = h0.size(1), of.H = h0.size(2);
    require(of.D == 1 || of.D == 2, "h0 must be of one direction or two, not ", of.D);
    of.N = N;
    of.T = of.N / of.B;
    of.batch_sizes = nullptr;
    if (batch_sizes_.has_value()) {
      take(*batch_sizes_);
    } else {
      require(of.T > 0 && of.T * of.B == of.N, first.name, " must have T * B rows, B = ", of.B);
    }
  }
  // Of a scan on these gates.
  static Steps of_gates(const Tensor& gates, const Tensor& h0, const OptionalTensor& batch_sizes,
                        const std::string& mode) {
    require(gates.dim() == 2 && gates.is_contiguous(),
            "gates must be [N, D * G * H] and contiguous");
    const Steps steps({gates, "gates"}, gates.size(0), h0, batch_sizes, mode);
    check_sizes(gates, "gates", {steps.of.N, steps.width()});
    return steps;
  }

  // The data of a tensor of such a shape and of x's dtype, made dense; null where there is none.
  const void* data(OptionalTensor& x, const char* name, Dims sizes) const {
    check(x, name, first, sizes);
    x = dense(x);
    return data_or_null(x);
  }
  const void* state(OptionalTensor& x, const char* name) const {
    return data(x, name, {of.D, of.B, of.H});
  }
  const void* rows(OptionalTensor& x, const char* name) const {
    return data(x, name, {of.N, of.D * of.H});
  }
  const void* w_hh(OptionalTensor& x, const char* name) const {
    return data(x, name, {of.G() * of.H, of.H});
  }
  int64_t width() const { return of.D * of.G() * of.H; }

 private:
  void take(const Tensor& sizes) {
    require(sizes.is_cpu() && sizes.is_contiguous() && sizes.dim() == 1 &&
                sizes.scalar_type() == torch::headeronly::ScalarType::Long,
            "batch_sizes must be int64 numbers on the CPU");
    check_storage(sizes, "batch_sizes");
    of.T = sizes.numel();
    of.batch_sizes = static_cast<const int64_t*>(sizes.const_data_ptr());
    int64_t sum = 0, most = of.B;
    for (int64_t t = 0; t < of.T; ++t) {
      const int64_t rows = of.batch_sizes[t];
      require(rows > 0 && rows <= most, "batch_sizes must be positive and never rise");
      sum += most = rows;
    }
    require(of.T > 0 && of.batch_sizes[0] == of.B && sum == of.N,
            "batch_sizes must begin with B = ", of.B, " and add up to ", of.N);
    batch_sizes = sizes;
    if (first.tensor.is_cpu()) return;
    batch_sizes =
        torch::stable::new_empty(first.tensor, {of.T}, torch::headeronly::ScalarType::Long);
    torch::stable::copy_(batch_sizes, sizes);
    of.batch_sizes = static_cast<const int64_t*>(batch_sizes.const_data_ptr());
  }
};

// States and weights are optional for Steps, which makes them dense in their place; those that a
// call must have are read as tensors.
#ifndef BIGKERN_SIMT
struct LayerCall {
  Arguments& in;
  Tensor x = in.tensor();
  OptionalTensor h0 = in.tensor(), c0 = in.optional();
  std::vector<Tensor> weights = in.list();  // of each direction w_ih, w_hh and, perhaps, b_ih, b_hh
  OptionalTensor batch_sizes = in.optional(), zoneout = in.optional();
  std::string mode = in.text();
  bool save = in.flag();
};

std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor> layer(LayerCall& call) {
  require(call.x.dim() >= 2 && call.x.numel() > 0, "x must be [.., I], and not empty");
  const int64_t I = call.x.size(call.x.dim() - 1);
  const Steps steps({call.x, "x"}, call.x.numel() / I, *call.h0, call.batch_sizes, call.mode);
  const Tensor x = dense(call.x);
  const Sizes& of = steps.of;
  const int64_t each = int64_t(call.weights.size()) / of.D;
  require((each == 2 || each == 4) && each * of.D == int64_t(call.weights.size()),
          "weights must be 2 or 4 a direction");
  require(call.c0.has_value() == (of.mode == Mode::lstm), "c0 is the LSTM's, and it needs one");
  std::vector<int64_t> sizes = {x.sizes().begin(), x.sizes().end()};
  sizes.back() = of.D * of.H;
  Tensor y = empty(x, sizes), hn = empty(x, {of.D, of.B, of.H});
  OptionalTensor cn, gates, reserve;
  if (call.c0.has_value()) cn = empty(x, {of.D, of.B, of.H});
  if (call.save) gates = empty(x, {of.N, steps.width()});
  if (call.save && of.G() > 1) reserve = empty_f32(x, {of.N, of.D * of.H});
  Layer p = {};
  p.of = of, p.I = I;
  p.x = x.const_data_ptr();
  std::vector<OptionalTensor> dense_weights = {call.weights.begin(), call.weights.end()};
  for (int64_t d = 0; d < of.D; ++d) {
    OptionalTensor* of_d = dense_weights.data() + d * each;
    p.w_ih[d] = steps.data(of_d[0], "w_ih", {of.G() * of.H, I});
    p.w_hh[d] = steps.w_hh(of_d[1], "w_hh");
    if (each == 2) continue;
    p.b_ih[d] = steps.data(of_d[2], "b_ih", {of.G() * of.H});
    p.b_hh[d] = steps.data(of_d[3], "b_hh", {of.G() * of.H});
  }
  p.h0 = steps.state(call.h0, "h0"), p.c0 = steps.state(call.c0, "c0");
  p.zoneout = steps.rows(call.zoneout, "zoneout");
  p.y = out(y), p.hn = out(hn), p.cn = out(cn);
  p.gates = out(gates), p.reserve = static_cast<float*>(out(reserve));
  const Parallel parallel = team_parallel();
  const Tensor workspace = empty_bytes(x, cpu::layer_workspace(p, parallel.threads));
  p.workspace = out(workspace);
  cpu::layer(p, parallel);
  return {y, hn, cn, gates, reserve};
}
#endif

struct ScanCall {
  Arguments& in;
  Tensor gates = in.tensor();
  OptionalTensor h0 = in.tensor(), c0 = in.optional();
  OptionalTensor w_hh = in.tensor(), w_hh_reverse = in.optional();
  OptionalTensor bias_n = in.optional(), batch_sizes = in.optional(), zoneout = in.optional();
  std::string mode = in.text();
  bool save = in.flag();
};

template <class Device>
std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor> scan(ScanCall& call) {
  const Tensor& gates = call.gates;
  const Steps steps = Steps::of_gates(gates, *call.h0, call.batch_sizes, call.mode);
  const Sizes& of = steps.of;
  const bool lstm = of.mode == Mode::lstm, rnn = of.G() == 1;
  require(call.c0.has_value() == lstm, "c0 is the LSTM's, and it needs one");
  require(call.w_hh_reverse.has_value() == (of.D == 2), "w_hh must be one a direction");
  Tensor y = empty(gates, {of.N, of.D * of.H}), hn = empty(gates, {of.D, of.B, of.H});
  OptionalTensor cn, reserve;
  if (lstm) cn = empty(gates, {of.D, of.B, of.H});
  if (call.save && !rnn) reserve = empty_f32(gates, {of.N, of.D * of.H});
  Scan p = {};
  p.of = of, p.gates = out(gates), p.save = call.save;
  p.h0 = steps.state(call.h0, "h0"), p.c0 = steps.state(call.c0, "c0");
  p.w_hh[0] = steps.w_hh(call.w_hh, "w_hh");
  p.w_hh[1] = steps.w_hh(call.w_hh_reverse, "w_hh_reverse");
  p.bias_n = steps.data(call.bias_n, "bias_n", {of.D, of.H});
  p.zoneout = steps.rows(call.zoneout, "zoneout");
  p.y = out(y), p.hn = out(hn), p.cn = out(cn), p.reserve = static_cast<float*>(out(reserve));
  const Tensor workspace = empty_bytes(gates, Device::workspace(p));
  p.workspace = out(workspace);
  Device::launch(p, gates);
  return {y, hn, cn, reserve};
}

struct ScanBackwardCall {
  Arguments& in;
  OptionalTensor dy = in.optional(), dhn = in.optional(), dcn = in.optional();
  Tensor gates = in.tensor();
  OptionalTensor h0 = in.tensor(), c0 = in.optional();
  OptionalTensor w_hh = in.tensor(), w_hh_reverse = in.optional();
  OptionalTensor batch_sizes = in.optional(), zoneout = in.optional();
  OptionalTensor y = in.tensor(), reserve = in.optional();
  std::string mode = in.text();
};

template <class Device>
std::tuple<Tensor, OptionalTensor, Tensor, OptionalTensor> scan_backward(ScanBackwardCall& call) {
  const Tensor& gates = call.gates;
  const Steps steps = Steps::of_gates(gates, *call.h0, call.batch_sizes, call.mode);
  const Sizes& of = steps.of;
  const OptionalTensor& reserve = call.reserve;
  const bool lstm = of.mode == Mode::lstm, gru = of.mode == Mode::gru;
  require(call.c0.has_value() == lstm, "c0 is the LSTM's, and it needs one");
  require(call.w_hh_reverse.has_value() == (of.D == 2), "w_hh must be one a direction");
  require(
      reserve.has_value() == (lstm || gru) && (!reserve.has_value() || reserve->is_contiguous()),
      "reserve must be the forward's");
  check_f32(reserve, "reserve", steps.first, {of.N, of.D * of.H});
  Tensor dgates = empty(gates, {of.N, steps.width()});
  Tensor dh0 = empty(gates, {of.D, of.B, of.H});
  OptionalTensor dhidden_n, dc0;
  if (gru) dhidden_n = empty(gates, {of.N, of.D * of.H});
  if (lstm) dc0 = empty(gates, {of.D, of.B, of.H});
  ScanBackward p = {};
  p.of = of, p.gates = gates.const_data_ptr();
  p.dy = steps.rows(call.dy, "dy");
  p.dhn = steps.state(call.dhn, "dhn"), p.dcn = steps.state(call.dcn, "dcn");
  p.h0 = steps.state(call.h0, "h0"), p.c0 = steps.state(call.c0, "c0");
  p.w_hh[0] = steps.w_hh(call.w_hh, "w_hh");
  p.w_hh[1] = steps.w_hh(call.w_hh_reverse, "w_hh_reverse");
  p.zoneout = steps.rows(call.zoneout, "zoneout"), p.y = steps.rows(call.y, "y");
  p.reserve = static_cast<const float*>(data_or_null(reserve));
  p.dgates = out(dgates), p.dhidden_n = out(dhidden_n), p.dh0 = out(dh0), p.dc0 = out(dc0);
  const Tensor workspace = empty_bytes(gates, Device::workspace(p));
  p.workspace = out(workspace);
  Device::launch(p, gates);
  return {dgates, dhidden_n, dh0, dc0};
}

#ifdef BIGKERN_CUDA
struct FitsCall {
  Arguments& in;
  Tensor h0 = in.tensor();
  std::string mode = in.text();
};

// Whether h0's device holds the recurrent weights of its D directions and H hidden units on chip.
bool fits(const FitsCall& call) {
  const Tensor& h0 = call.h0;
  require(h0.dim() == 3, "h0 must be [D, B, H]");
  Sizes of{};
  of.dtype = dtype_of(h0, "h0"), of.mode = mode_of(call.mode);
  of.T = of.N = of.B = 1, of.D = h0.size(0), of.H = h0.size(2);
#ifndef BIGKERN_SIMT
  const torch::stable::accelerator::DeviceGuard guard(h0.get_device_index());
#endif
  return cuda::fits(of);
}

template <class Library>
void implement_cuda(Library& m) {
  m.impl("recurrent_fits", &boxed<fits>);
  m.impl("recurrent_scan", &boxed<scan<Cuda>>);
  m.impl("recurrent_scan_backward", &boxed<scan_backward<Cuda>>);
}
#endif

}  // namespace

#ifdef BIGKERN_SIMT
STABLE_TORCH_LIBRARY_IMPL(bigkern_simt, CPU, m) { implement_cuda(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(bigkern_native, CPU, m) {
  m.impl("recurrent", &boxed<layer>);
  m.impl("recurrent_scan", &boxed<scan<Cpu>>);
  m.impl("recurrent_scan_backward", &boxed<scan_backward<Cpu>>);
}
#ifdef BIGKERN_CUDA
STABLE_TORCH_LIBRARY_IMPL(bigkern_native, CUDA, m) { implement_cuda(m); }
#endif
#endif

}  // namespace bigkern::recurrent
