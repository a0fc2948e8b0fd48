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
struct Call {
  First first;
  Sizes of;
  Tensor batch_sizes;  // keeps a copy on the device alive

  Call(const First& first, int64_t N, const Tensor& h0, const OptionalTensor& batch_sizes_,
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
  static Call of_gates(const Tensor& gates, const Tensor& h0, const OptionalTensor& batch_sizes,
                       const std::string& mode) {
    require(gates.dim() == 2 && gates.is_contiguous(),
            "gates must be [N, D * G * H] and contiguous");
    const Call call({gates, "gates"}, gates.size(0), h0, batch_sizes, mode);
    check_sizes(gates, "gates", {call.of.N, call.width()});
    return call;
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

#ifndef BIGKERN_SIMT
// The weights in torch's flat order: w_ih, w_hh and, if there are any, b_ih, b_hh of each
// direction.
std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor> layer(
    const Tensor& x_, const Tensor& h0_, OptionalTensor c0, const std::vector<Tensor>& weights,
    const OptionalTensor& batch_sizes, OptionalTensor zoneout, const std::string& mode, bool save) {
  require(x_.dim() >= 2 && x_.numel() > 0, "x must be [.., I], and not empty");
  const int64_t I = x_.size(x_.dim() - 1);
  const Call call({x_, "x"}, x_.numel() / I, h0_, batch_sizes, mode);
  const Tensor x = dense(x_);
  const Sizes& of = call.of;
  const int64_t each = int64_t(weights.size()) / of.D;
  require((each == 2 || each == 4) && each * of.D == int64_t(weights.size()),
          "weights must be 2 or 4 a direction");
  require(c0.has_value() == (of.mode == Mode::lstm), "c0 is the LSTM's, and it needs one");
  std::vector<int64_t> sizes = {x.sizes().begin(), x.sizes().end()};
  sizes.back() = of.D * of.H;
  Tensor y = empty(x, sizes), hn = empty(x, {of.D, of.B, of.H});
  OptionalTensor h0 = h0_, cn, gates, reserve;
  if (c0.has_value()) cn = empty(x, {of.D, of.B, of.H});
  if (save) gates = empty(x, {of.N, call.width()});
  if (save && of.G() > 1) reserve = empty_f32(x, {of.N, of.D * of.H});
  Layer p = {};
  p.of = of, p.I = I;
  p.x = x.const_data_ptr();
  std::vector<OptionalTensor> dense_weights = {weights.begin(), weights.end()};
  for (int64_t d = 0; d < of.D; ++d) {
    OptionalTensor* of_d = dense_weights.data() + d * each;
    p.w_ih[d] = call.data(of_d[0], "w_ih", {of.G() * of.H, I});
    p.w_hh[d] = call.w_hh(of_d[1], "w_hh");
    if (each == 2) continue;
    p.b_ih[d] = call.data(of_d[2], "b_ih", {of.G() * of.H});
    p.b_hh[d] = call.data(of_d[3], "b_hh", {of.G() * of.H});
  }
  p.h0 = call.state(h0, "h0");
  p.c0 = call.state(c0, "c0");
  p.zoneout = call.rows(zoneout, "zoneout");
  p.y = y.mutable_data_ptr();
  p.hn = hn.mutable_data_ptr();
  p.cn = cn.has_value() ? cn->mutable_data_ptr() : nullptr;
  p.gates = gates.has_value() ? gates->mutable_data_ptr() : nullptr;
  p.reserve = reserve.has_value() ? static_cast<float*>(reserve->mutable_data_ptr()) : nullptr;
  const Parallel parallel = team_parallel();
  const Tensor workspace = empty_bytes(x, cpu::layer_workspace(p, parallel.threads));
  p.workspace = workspace.mutable_data_ptr();
  cpu::layer(p, parallel);
  return {y, hn, cn, gates, reserve};
}
#endif

#ifdef BIGKERN_CUDA
std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor> scan(
    const Tensor& gates, const Tensor& h0_, OptionalTensor c0, const Tensor& w_hh_,
    OptionalTensor w_hh_reverse, OptionalTensor bias_n, const OptionalTensor& batch_sizes,
    OptionalTensor zoneout, const std::string& mode, bool save) {
  const Call call = Call::of_gates(gates, h0_, batch_sizes, mode);
  const Sizes& of = call.of;
  OptionalTensor h0 = h0_, w_hh = w_hh_;
  const bool lstm = of.mode == Mode::lstm, rnn = of.G() == 1;
  require(c0.has_value() == lstm, "c0 is the LSTM's, and it needs one");
  require(w_hh_reverse.has_value() == (of.D == 2), "w_hh must be one a direction");
  Tensor y = empty(gates, {of.N, of.D * of.H}), hn = empty(gates, {of.D, of.B, of.H});
  OptionalTensor cn, reserve;
  if (lstm) cn = empty(gates, {of.D, of.B, of.H});
  if (save && !rnn) reserve = empty_f32(gates, {of.N, of.D * of.H});
  Scan p = {of,
            gates.mutable_data_ptr(),
            call.state(h0, "h0"),
            call.state(c0, "c0"),
            {call.w_hh(w_hh, "w_hh"), call.w_hh(w_hh_reverse, "w_hh_reverse")},
            call.data(bias_n, "bias_n", {of.D, of.H}),
            call.rows(zoneout, "zoneout"),
            y.mutable_data_ptr(),
            hn.mutable_data_ptr(),
            lstm ? cn->mutable_data_ptr() : nullptr,
            reserve.has_value() ? static_cast<float*>(reserve->mutable_data_ptr()) : nullptr,
            save,
            nullptr};
  const Tensor workspace = empty_bytes(gates, Cuda::workspace(p));
  p.workspace = workspace.mutable_data_ptr();
  Cuda::launch(p, gates);
  return {y, hn, cn, reserve};
}
#endif

template <class Device>
std::tuple<Tensor, OptionalTensor, Tensor, OptionalTensor> scan_backward(
    OptionalTensor dy, OptionalTensor dhn, OptionalTensor dcn, const Tensor& gates,
    const Tensor& h0_, OptionalTensor c0, const Tensor& w_hh_, OptionalTensor w_hh_reverse,
    const OptionalTensor& batch_sizes, OptionalTensor zoneout, const Tensor& y_,
    const OptionalTensor& reserve, const std::string& mode) {
  const Call call = Call::of_gates(gates, h0_, batch_sizes, mode);
  const Sizes& of = call.of;
  OptionalTensor h0 = h0_, w_hh = w_hh_, y = y_;
  const bool lstm = of.mode == Mode::lstm, gru = of.mode == Mode::gru;
  require(c0.has_value() == lstm, "c0 is the LSTM's, and it needs one");
  require(w_hh_reverse.has_value() == (of.D == 2), "w_hh must be one a direction");
  require(
      reserve.has_value() == (lstm || gru) && (!reserve.has_value() || reserve->is_contiguous()),
      "reserve must be the forward's");
  check_f32(reserve, "reserve", call.first, {of.N, of.D * of.H});
  Tensor dgates = empty(gates, {of.N, of.D * of.G() * of.H});
  Tensor dh0 = empty(gates, {of.D, of.B, of.H});
  OptionalTensor dhidden_n, dc0;
  if (gru) dhidden_n = empty(gates, {of.N, of.D * of.H});
  if (lstm) dc0 = empty(gates, {of.D, of.B, of.H});
  ScanBackward p = {of,
                    call.rows(dy, "dy"),
                    call.state(dhn, "dhn"),
                    call.state(dcn, "dcn"),
                    gates.const_data_ptr(),
                    call.state(h0, "h0"),
                    call.state(c0, "c0"),
                    {call.w_hh(w_hh, "w_hh"), call.w_hh(w_hh_reverse, "w_hh_reverse")},
                    call.rows(zoneout, "zoneout"),
                    call.rows(y, "y"),
                    static_cast<const float*>(data_or_null(reserve)),
                    dgates.mutable_data_ptr(),
                    gru ? dhidden_n->mutable_data_ptr() : nullptr,
                    dh0.mutable_data_ptr(),
                    lstm ? dc0->mutable_data_ptr() : nullptr,
                    nullptr};
  const Tensor workspace = empty_bytes(gates, Device::workspace(p));
  p.workspace = workspace.mutable_data_ptr();
  Device::launch(p, gates);
  return {dgates, dhidden_n, dh0, dc0};
}

#ifdef BIGKERN_CUDA
// Whether h0's device holds the recurrent weights of its D directions and H hidden units on chip.
bool fits(const Tensor& h0, const std::string& mode) {
  require(h0.dim() == 3, "h0 must be [D, B, H]");
  Sizes of{};
  of.dtype = dtype_of(h0, "h0"), of.mode = mode_of(mode);
  of.T = of.N = of.B = 1, of.D = h0.size(0), of.H = h0.size(2);
#ifndef BIGKERN_SIMT
  const torch::stable::accelerator::DeviceGuard guard(h0.get_device_index());
#endif
  return cuda::fits(of);
}
#endif

}  // namespace
}  // namespace bigkern::recurrent

#ifdef BIGKERN_SIMT
STABLE_TORCH_LIBRARY_IMPL(bigkern_simt, CPU, m) {
  m.impl("recurrent_fits", TORCH_BOX(&bigkern::recurrent::fits));
  m.impl("recurrent_scan", TORCH_BOX(&bigkern::recurrent::scan));
  m.impl("recurrent_scan_backward",
         TORCH_BOX(&bigkern::recurrent::scan_backward<bigkern::recurrent::Cuda>));
}
#else
STABLE_TORCH_LIBRARY_IMPL(bigkern_native, CPU, m) {
  m.impl("recurrent", TORCH_BOX(&bigkern::recurrent::layer));
  m.impl("recurrent_scan_backward",
         TORCH_BOX(&bigkern::recurrent::scan_backward<bigkern::recurrent::Cpu>));
}
#ifdef BIGKERN_CUDA
STABLE_TORCH_LIBRARY_IMPL(bigkern_native, CUDA, m) {
  m.impl("recurrent_fits", TORCH_BOX(&bigkern::recurrent::fits));
  m.impl("recurrent_scan", TORCH_BOX(&bigkern::recurrent::scan));
  m.impl("recurrent_scan_backward",
         TORCH_BOX(&bigkern::recurrent::scan_backward<bigkern::recurrent::Cuda>));
}
#endif
#endif
