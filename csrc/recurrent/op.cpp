// The scan of a recurrent layer as torch ops: check, allocate, launch.
#include "common/op.h"

#include "recurrent/recurrent.h"

namespace bigkern::recurrent {
namespace {

struct Cpu {
  static size_t workspace(const Scan& call) {
    return cpu::scan_workspace(call, torch_parallel().threads);
  }
  static size_t workspace(const ScanBackward& call) {
    return cpu::scan_backward_workspace(call, torch_parallel().threads);
  }
  static void launch(const Scan& call, const Tensor&) { cpu::scan(call, torch_parallel()); }
  static void launch(const ScanBackward& call, const Tensor&) {
    cpu::scan_backward(call, torch_parallel());
  }
};

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
  STD_TORCH_CHECK(mode == "RNN_RELU", "mode must be LSTM, GRU, RNN_TANH or RNN_RELU, not ", mode);
  return Mode::rnn_relu;
}

// The sizes of a call, and where its batch sizes are read.
struct Call {
  Sizes of;
  Tensor batch_sizes;  // keeps a copy on the device alive

  Call(const Tensor& gates, const Tensor& h0, const OptionalTensor& batch_sizes_,
       const std::string& mode)
      : batch_sizes(h0) {
    of.dtype = dtype_of(gates, "gates");
    of.mode = mode_of(mode);
    STD_TORCH_CHECK(h0.dim() == 3 && h0.numel() > 0, "h0 must be [D, B, H], and not empty");
    of.D = h0.size(0), of.B = h0.size(1), of.H = h0.size(2);
    STD_TORCH_CHECK(of.D == 1 || of.D == 2, "h0 must be of one direction or two, not ", of.D);
    const int64_t width = of.D * of.G() * of.H;
    STD_TORCH_CHECK(gates.dim() == 2 && gates.size(1) == width && gates.is_contiguous(),
                    "gates must be [N, ", width, "] and contiguous");
    of.N = gates.size(0);
    of.T = of.N / of.B;
    of.batch_sizes = nullptr;
    if (batch_sizes_.has_value()) {
      take(*batch_sizes_, gates);
    } else {
      STD_TORCH_CHECK(of.T > 0 && of.T * of.B == of.N, "gates must have T * B rows, B = ", of.B);
    }
  }

  // A tensor of these sizes and of the gates' dtype, dense; null where there is none.
  const void* data(OptionalTensor& x, const char* name, int64_t numel) const {
    if (!x.has_value()) return nullptr;
    STD_TORCH_CHECK(dtype_of(*x, name) == of.dtype, name, " has another dtype than gates");
    STD_TORCH_CHECK(x->numel() == numel, name, " must have ", numel, " elements");
    x = dense(*x);
    return x->const_data_ptr();
  }
  int64_t state() const { return of.D * of.B * of.H; }
  int64_t rows() const { return of.N * of.D * of.H; }
  int64_t weight() const { return of.G() * of.H * of.H; }

 private:
  void take(const Tensor& sizes, const Tensor& gates) {
    STD_TORCH_CHECK(sizes.is_cpu() && sizes.is_contiguous() && sizes.dim() == 1 &&
                        sizes.scalar_type() == torch::headeronly::ScalarType::Long,
                    "batch_sizes must be int64 numbers on the CPU");
    of.T = sizes.numel();
    of.batch_sizes = static_cast<const int64_t*>(sizes.const_data_ptr());
    int64_t sum = 0, most = of.B;
    for (int64_t t = 0; t < of.T; ++t) {
      const int64_t rows = of.batch_sizes[t];
      STD_TORCH_CHECK(rows > 0 && rows <= most, "batch_sizes must be positive and never rise");
      sum += most = rows;
    }
    STD_TORCH_CHECK(of.T > 0 && of.batch_sizes[0] == of.B && sum == of.N,
                    "batch_sizes must begin with B = ", of.B, " and add up to ", of.N);
    batch_sizes = sizes;
    if (gates.is_cpu()) return;
    batch_sizes = torch::stable::new_empty(gates, {of.T}, torch::headeronly::ScalarType::Long);
    torch::stable::copy_(batch_sizes, sizes);
    of.batch_sizes = static_cast<const int64_t*>(batch_sizes.const_data_ptr());
  }
};

const float* reserve_data(const OptionalTensor& reserve, int64_t numel) {
  if (!reserve.has_value()) return nullptr;
  STD_TORCH_CHECK(reserve->scalar_type() == torch::headeronly::ScalarType::Float &&
                      reserve->is_contiguous() && reserve->numel() == numel,
                  "reserve must be the forward's");
  return static_cast<const float*>(reserve->const_data_ptr());
}

template <class Device>
std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor> scan(
    const Tensor& gates, const Tensor& h0_, OptionalTensor c0, const Tensor& w_hh_,
    OptionalTensor w_hh_reverse, OptionalTensor bias_n, const OptionalTensor& batch_sizes,
    OptionalTensor zoneout, const std::string& mode, bool save) {
  const Call call(gates, h0_, batch_sizes, mode);
  const Sizes& of = call.of;
  OptionalTensor h0 = h0_, w_hh = w_hh_;
  const bool lstm = of.mode == Mode::lstm, rnn = of.G() == 1;
  STD_TORCH_CHECK(c0.has_value() == lstm, "c0 is the LSTM's, and it needs one");
  STD_TORCH_CHECK(w_hh_reverse.has_value() == (of.D == 2), "w_hh must be one a direction");
  Tensor y = empty(gates, {of.N, of.D * of.H}), hn = empty(gates, {of.D, of.B, of.H});
  OptionalTensor cn, reserve;
  if (lstm) cn = empty(gates, {of.D, of.B, of.H});
  if (save && !rnn) reserve = empty_f32(gates, {of.N, of.D * of.H});
  Scan p = {of,
            gates.mutable_data_ptr(),
            call.data(h0, "h0", call.state()),
            call.data(c0, "c0", call.state()),
            {call.data(w_hh, "w_hh", call.weight()),
             call.data(w_hh_reverse, "w_hh_reverse", call.weight())},
            call.data(bias_n, "bias_n", of.D * of.H),
            call.data(zoneout, "zoneout", call.rows()),
            y.mutable_data_ptr(),
            hn.mutable_data_ptr(),
            lstm ? cn->mutable_data_ptr() : nullptr,
            reserve.has_value() ? static_cast<float*>(reserve->mutable_data_ptr()) : nullptr,
            save,
            nullptr};
  const Tensor workspace = empty_bytes(gates, Device::workspace(p));
  p.workspace = workspace.mutable_data_ptr();
  Device::launch(p, gates);
  return {y, hn, cn, reserve};
}

template <class Device>
std::tuple<Tensor, OptionalTensor, Tensor, OptionalTensor> scan_backward(
    OptionalTensor dy, OptionalTensor dhn, OptionalTensor dcn, const Tensor& gates,
    const Tensor& h0_, OptionalTensor c0, const Tensor& w_hh_, OptionalTensor w_hh_reverse,
    const OptionalTensor& batch_sizes, OptionalTensor zoneout, const Tensor& y_,
    const OptionalTensor& reserve, const std::string& mode) {
  const Call call(gates, h0_, batch_sizes, mode);
  const Sizes& of = call.of;
  OptionalTensor h0 = h0_, w_hh = w_hh_, y = y_;
  const bool lstm = of.mode == Mode::lstm, gru = of.mode == Mode::gru;
  STD_TORCH_CHECK(c0.has_value() == lstm, "c0 is the LSTM's, and it needs one");
  STD_TORCH_CHECK(w_hh_reverse.has_value() == (of.D == 2), "w_hh must be one a direction");
  STD_TORCH_CHECK(reserve.has_value() == (lstm || gru), "reserve must be the forward's");
  Tensor dgates = empty(gates, {of.N, of.D * of.G() * of.H});
  Tensor dh0 = empty(gates, {of.D, of.B, of.H});
  OptionalTensor dhidden_n, dc0;
  if (gru) dhidden_n = empty(gates, {of.N, of.D * of.H});
  if (lstm) dc0 = empty(gates, {of.D, of.B, of.H});
  ScanBackward p = {of,
                    call.data(dy, "dy", call.rows()),
                    call.data(dhn, "dhn", call.state()),
                    call.data(dcn, "dcn", call.state()),
                    gates.const_data_ptr(),
                    call.data(h0, "h0", call.state()),
                    call.data(c0, "c0", call.state()),
                    {call.data(w_hh, "w_hh", call.weight()),
                     call.data(w_hh_reverse, "w_hh_reverse", call.weight())},
                    call.data(zoneout, "zoneout", call.rows()),
                    call.data(y, "y", call.rows()),
                    reserve_data(reserve, call.rows()),
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

template <class Device, class Library>
void implement(Library& m) {
  m.impl("recurrent_scan", TORCH_BOX(&scan<Device>));
  m.impl("recurrent_scan_backward", TORCH_BOX(&scan_backward<Device>));
}

}  // namespace
}  // namespace bigkern::recurrent

#ifdef BIGKERN_SIMT
STABLE_TORCH_LIBRARY_IMPL(bigkern_simt, CPU, m) {
  bigkern::recurrent::implement<bigkern::recurrent::Cuda>(m);
}
#else
STABLE_TORCH_LIBRARY_IMPL(bigkern_native, CPU, m) {
  bigkern::recurrent::implement<bigkern::recurrent::Cpu>(m);
}
#ifdef BIGKERN_CUDA
STABLE_TORCH_LIBRARY_IMPL(bigkern_native, CUDA, m) {
  bigkern::recurrent::implement<bigkern::recurrent::Cuda>(m);
}
#endif
#endif
