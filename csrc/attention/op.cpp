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
std::tuple<Tensor, Tensor> attention(const ForwardCall& call) {
  const Shape s = shape_of({call.q, "q"}, call.k, call.v, call.rules);
  const Tensor q = with_dense_rows(call.q), k = with_dense_rows(call.k),
               v = with_dense_rows(call.v);
  Tensor o = empty_bshd(q, s.Hq, q.size(2), s.Dv);
  Tensor lse = empty_f32(q, {q.size(0), s.Hq, q.size(2)});
  Tensor workspace = empty_bytes(q, Device::forward_workspace(s));
  Forward p = {};
  p.shape = s;
  p.q = in(q), p.k = in(k), p.v = in(v), p.o = out(o);
  p.lse = statistic(lse, static_cast<float*>(lse.mutable_data_ptr()));
  p.workspace = workspace.mutable_data_ptr();
  Device::forward(p, q);
  return {o, lse};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const BackwardCall& call) {
  const First first(call.q, "q");
  const Shape s = shape_of(first, call.k, call.v, call.rules);
  const int64_t B = call.q.size(0), rows = call.q.size(2);
  check(call.do_, "do", first, {B, s.Hq, rows, s.Dv});
  check(call.o, "o", first, {B, s.Hq, rows, s.Dv});
  check_f32(call.lse, "lse", first, {B, s.Hq, rows});
  check_f32(call.dlse, "dlse", first, {B, s.Hq, rows});
  const OptionalTensor& bias = call.rules.bias;
  require(!call.want_bias || bias.has_value(), "want_bias needs a bias");
  const Tensor dout = with_dense_rows(call.do_), o = with_dense_rows(call.o);
  const Tensor q = with_dense_rows(call.q), k = with_dense_rows(call.k),
               v = with_dense_rows(call.v);
  const Tensor lse = dense(call.lse);
  const OptionalTensor dlse = dense(call.dlse);
  Tensor dq = empty_bshd(q, s.Hq, q.size(2), s.D);
  Tensor dk = empty_bshd(q, s.Hkv, k.size(2), s.D);
  Tensor dv = empty_bshd(q, s.Hkv, k.size(2), s.Dv);
  Tensor dbias =
      call.want_bias ? empty(q, {bias->sizes().begin(), bias->sizes().end()}) : empty(q, {0});
  Tensor workspace = empty_bytes(q, Device::backward_workspace(s));
  Backward p = {};
  p.shape = s;
  p.q = in(q), p.k = in(k), p.v = in(v), p.o = in(o), p.dout = in(dout);
  p.lse = statistic(lse, data_of<float>(lse)), p.dlse = statistic(lse, data_of<float>(dlse));
  p.dq = out(dq), p.dk = out(dk), p.dv = out(dv);
  if (call.want_bias) p.dbias = broadcast(dbias, dbias.mutable_data_ptr());
  p.workspace = workspace.mutable_data_ptr();
  Device::backward(p, q);
  return {dq, dk, dv, dbias};
}

template <class Device>
std::tuple<Tensor, Tensor> decode_attention(const DecodeCall& call) {
  const First first(call.q, "q");
  const Shape s = shape_of(first, call);
  Decode p = {};
  p.shape = s;
  p.lengths = lengths_of(call.cache_seqlens, s, first);
  if (call.page_table.has_value()) {
    check_pages(*call.page_table, p.lengths, call.k_cache);
    p.pages = {data_of<int32_t>(call.page_table), call.page_table->size(1), call.k_cache.size(2)};
  }
  const Tensor q = with_dense_rows(call.q);
  const Tensor k = with_dense_rows(call.k_cache), v = with_dense_rows(call.v_cache);
  Tensor o = empty_bshd(q, s.Hq, s.Sq, s.Dv);
  Tensor lse = empty_f32(q, {s.B, s.Hq, s.Sq});
  Tensor workspace = empty_bytes(q, Device::decode_workspace(s));
  p.q = in(q), p.k = in(k), p.v = in(v), p.o = out(o);
  p.lse = statistic(lse, static_cast<float*>(lse.mutable_data_ptr()));
  p.workspace = workspace.mutable_data_ptr();
  Device::decode(p, q);
  return {o, lse};
}

template <class Device, class Library>
void implement(Library& m) {
  m.impl("attention", &boxed<attention<Device>>);
  m.impl("attention_backward", &boxed<attention_backward<Device>>);
  m.impl("decode_attention", &boxed<decode_attention<Device>>);
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

}  // namespace bigkern::attention
