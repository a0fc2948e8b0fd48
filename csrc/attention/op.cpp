// Attention as torch ops: check, allocate, launch.
#include "attention/op.h"

namespace bigkern::attention {
namespace {

struct Cpu {
  static size_t forward_workspace(const Shape& s) {
    return cpu::forward_workspace(s, torch_parallel().threads);
  }
  static size_t backward_workspace(const Shape& s) {
    return cpu::backward_workspace(s, torch_parallel().threads);
  }
  static size_t decode_workspace(const Shape& s) {
    return cpu::decode_workspace(s, torch_parallel().threads);
  }
  static void forward(const Forward& call, const Tensor&) { cpu::forward(call, torch_parallel()); }
  static void backward(const Backward& call, const Tensor&) {
    cpu::backward(call, torch_parallel());
  }
  static void decode(const Decode& call, const Tensor&) { cpu::decode(call, torch_parallel()); }
};

#ifdef BIGKERN_CUDA
struct Cuda {
  static size_t forward_workspace(const Shape& s) { return cuda::forward_workspace(s); }
  static size_t backward_workspace(const Shape& s) { return cuda::backward_workspace(s); }
  static size_t decode_workspace(const Shape& s) { return cuda::decode_workspace(s); }
  static void forward(const Forward& call, const Tensor& q) {
    launch_on_device(q, "attention", [&](void* stream) { return cuda::forward(call, stream); });
  }
  static void backward(const Backward& call, const Tensor& q) {
    launch_on_device(q, "attention_backward",
                     [&](void* stream) { return cuda::backward(call, stream); });
  }
  static void decode(const Decode& call, const Tensor& q) {
    launch_on_device(q, "decode_attention",
                     [&](void* stream) { return cuda::decode(call, stream); });
  }
};
#endif

template <class Device>
std::tuple<Tensor, Tensor> attention(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                     const OptionalTensor& mask, const OptionalTensor& bias,
                                     const OptionalTensor& alibi_slopes,
                                     const OptionalTensor& sinks, const OptionalTensor& dropout_key,
                                     const OptionalTensor& cu_seqlens_q,
                                     const OptionalTensor& cu_seqlens_k, double scale,
                                     const std::string& causal, int64_t window_left,
                                     int64_t window_right, double softcap, double dropout_p,
                                     int64_t max_seqlen_q, int64_t max_seqlen_k) {
  const Shape s =
      shape_of({q_, "q"}, k_, v_,
               {mask, bias, alibi_slopes, sinks, dropout_key, cu_seqlens_q, cu_seqlens_k, scale,
                causal, window_left, window_right, softcap, dropout_p, max_seqlen_q, max_seqlen_k});
  const Tensor q = with_dense_rows(q_), k = with_dense_rows(k_), v = with_dense_rows(v_);
  Tensor o = empty_bshd(q, s.Hq, q.size(2), s.Dv);
  Tensor lse = empty_f32(q, {q.size(0), s.Hq, q.size(2)});
  Tensor workspace = empty_bytes(q, Device::forward_workspace(s));
  Device::forward(
      {s, in(q), in(k), in(v), out(o), statistic(lse, static_cast<float*>(lse.mutable_data_ptr())),
       workspace.mutable_data_ptr()},
      q);
  return {o, lse};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout_, const OptionalTensor& dlse_, const Tensor& q_, const Tensor& k_,
    const Tensor& v_, const Tensor& o_, const Tensor& lse_, bool bias_grad,
    const OptionalTensor& mask, const OptionalTensor& bias, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& dropout_key,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, double scale,
    const std::string& causal, int64_t window_left, int64_t window_right, double softcap,
    double dropout_p, int64_t max_seqlen_q, int64_t max_seqlen_k) {
  const First first(q_, "q");
  const Shape s =
      shape_of(first, k_, v_,
               {mask, bias, alibi_slopes, sinks, dropout_key, cu_seqlens_q, cu_seqlens_k, scale,
                causal, window_left, window_right, softcap, dropout_p, max_seqlen_q, max_seqlen_k});
  const int64_t B = q_.size(0), rows = q_.size(2);
  check(dout_, "do", first, {B, s.Hq, rows, s.Dv});
  check(o_, "o", first, {B, s.Hq, rows, s.Dv});
  check_f32(lse_, "lse", first, {B, s.Hq, rows});
  check_f32(dlse_, "dlse", first, {B, s.Hq, rows});
  require(!bias_grad || bias.has_value(), "bias_grad needs a bias");
  const Tensor dout = with_dense_rows(dout_), o = with_dense_rows(o_);
  const Tensor q = with_dense_rows(q_), k = with_dense_rows(k_), v = with_dense_rows(v_);
  const Tensor lse = torch::stable::contiguous(lse_);
  const Tensor dlse = dlse_.has_value() ? torch::stable::contiguous(*dlse_) : lse;
  const void* dlse_data = dlse_.has_value() ? dlse.const_data_ptr() : nullptr;
  Tensor dq = empty_bshd(q, s.Hq, q.size(2), s.D);
  Tensor dk = empty_bshd(q, s.Hkv, k.size(2), s.D);
  Tensor dv = empty_bshd(q, s.Hkv, k.size(2), s.Dv);
  Tensor dbias = bias_grad ? empty(q, {bias->size(0), bias->size(1), bias->size(2), bias->size(3)})
                           : empty(q, {0});
  Tensor workspace = empty_bytes(q, Device::backward_workspace(s));
  Backward call{s,
                in(dout),
                in(q),
                in(k),
                in(v),
                in(o),
                statistic(lse, static_cast<const float*>(lse.const_data_ptr())),
                statistic(lse, static_cast<const float*>(dlse_data)),
                out(dq),
                out(dk),
                out(dv),
                {},
                workspace.mutable_data_ptr()};
  if (bias_grad) call.dbias = broadcast(dbias, dbias.mutable_data_ptr());
  Device::backward(call, q);
  return {dq, dk, dv, dbias};
}

// The cache is contiguous, [B, Hkv, S, D], or, with a page table, [pages, Hkv, page_size, D].
template <class Device>
std::tuple<Tensor, Tensor> decode_attention(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                            const Tensor& cache_seqlens,
                                            const OptionalTensor& page_table,
                                            const OptionalTensor& alibi_slopes,
                                            const OptionalTensor& sinks, double scale,
                                            const std::string& causal, int64_t window_left,
                                            int64_t window_right, double softcap) {
  const First first(q_, "q");
  const Shape s =
      decode_shape_of(first, k_, v_, page_table,
                      {std::nullopt, std::nullopt, alibi_slopes, sinks, std::nullopt, std::nullopt,
                       std::nullopt, scale, causal, window_left, window_right, softcap, 0.0, 0, 0});
  const int32_t* const lengths = lengths_of(cache_seqlens, s, first);
  Pages pages{nullptr, 0, 0};
  if (page_table.has_value()) {
    check_pages(*page_table, lengths, k_);
    pages = {data_of<int32_t>(page_table), page_table->size(1), k_.size(2)};
  }
  const Tensor q = with_dense_rows(q_), k = with_dense_rows(k_), v = with_dense_rows(v_);
  Tensor o = empty_bshd(q, s.Hq, s.Sq, s.Dv);
  Tensor lse = empty_f32(q, {s.B, s.Hq, s.Sq});
  Tensor workspace = empty_bytes(q, Device::decode_workspace(s));
  Device::decode(
      {s, in(q), in(k), in(v), lengths, pages, out(o),
       statistic(lse, static_cast<float*>(lse.mutable_data_ptr())), workspace.mutable_data_ptr()},
      q);
  return {o, lse};
}

template <class Device, class Library>
void implement(Library& m) {
  m.impl("attention", TORCH_BOX(&attention<Device>));
  m.impl("attention_backward", TORCH_BOX(&attention_backward<Device>));
  m.impl("decode_attention", TORCH_BOX(&decode_attention<Device>));
}

}  // namespace
}  // namespace bigkern::attention

#ifdef BIGKERN_SIMT
STABLE_TORCH_LIBRARY_IMPL(bigkern_simt, CPU, m) {
  bigkern::attention::implement<bigkern::attention::Cuda>(m);
}
#else
STABLE_TORCH_LIBRARY_IMPL(bigkern_native, CPU, m) {
  bigkern::attention::implement<bigkern::attention::Cpu>(m);
}
#ifdef BIGKERN_CUDA
STABLE_TORCH_LIBRARY_IMPL(bigkern_native, CUDA, m) {
  bigkern::attention::implement<bigkern::attention::Cuda>(m);
}
#endif
#endif
