// Attention as a torch op: check, allocate, launch.
#include "common/op.h"

#include "attention/attention.h"

namespace bigkern::attention {
namespace {

Causal causal_of(const std::string& name) {
  if (name == "none") return Causal::none;
  if (name == "top_left") return Causal::top_left;
  STD_TORCH_CHECK(name == "bottom_right", "causal must be none, top_left or bottom_right, not ",
                  name);
  return Causal::bottom_right;
}

template <class Pointer>
View<Pointer> view(const Tensor& x, Pointer data) {
  return {data, x.stride(0), x.stride(1), x.stride(2)};
}

View<const void*> in(const Tensor& x) { return view<const void*>(x, x.const_data_ptr()); }
View<void*> out(const Tensor& x) { return view<void*>(x, x.mutable_data_ptr()); }

Broadcast broadcast(const OptionalTensor& x) {
  if (!x.has_value()) return {nullptr, 0, 0, 0, 0};
  return {x->const_data_ptr(), x->stride(0), x->stride(1), x->stride(2), x->stride(3)};
}

// The kernels read rows as vectors: the last stride must be 1 (or the row a single element).
Tensor with_dense_rows(const Tensor& x) {
  return x.size(3) <= 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

// An uninitialised [B, H, S, D] stored as [B, S, H, D]: merging heads afterwards needs no copy.
// Straight from the allocator: through the dispatcher, allocating would cost small calls more than
// their kernel.
Tensor empty_bshd(const Tensor& like, int64_t H, int64_t S, int64_t D) {
  const int64_t B = like.size(0);
  const int64_t sizes[] = {B, H, S, D};
  const int64_t strides[] = {S * H * D, D, H * D, 1};
  int32_t dtype = 0, device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, sizes, strides, dtype, device, like.get_device_index(), &handle));
  return Tensor(handle);
}

void check_broadcast(const OptionalTensor& x, const char* name, const Shape& s) {
  if (!x.has_value()) return;
  const bool fits = x->dim() == 4 && x->size(0) == s.B && x->size(1) == s.Hq &&
                    x->size(2) == s.Sq && x->size(3) == s.Sk;
  STD_TORCH_CHECK(fits, name, " must be expanded to [B, Hq, Sq, Sk]");
}

Shape shape_of(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
               const OptionalTensor& bias, double scale, const std::string& causal) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must be [B, H, S, D]");
  Shape s{dtype_of(q, "q"),  q.size(0), q.size(1),
          k.size(1),         q.size(2), k.size(2),
          q.size(3),         v.size(3), static_cast<float>(scale),
          causal_of(causal), {},        {}};
  STD_TORCH_CHECK(dtype_of(k, "k") == s.dtype && dtype_of(v, "v") == s.dtype,
                  "q, k and v must have one dtype");
  STD_TORCH_CHECK(k.size(0) == s.B && k.size(3) == s.D && v.size(0) == s.B && v.size(1) == s.Hkv &&
                      v.size(2) == s.Sk,
                  "q, k and v must agree in batch, key heads, key length and head_dim");
  STD_TORCH_CHECK(s.Hkv > 0 && s.Hq % s.Hkv == 0, "q's heads must be a multiple of k's");
  STD_TORCH_CHECK(s.D <= kMaxHeadDim && s.Dv <= kMaxHeadDim, "head_dim must be at most ",
                  kMaxHeadDim);
  STD_TORCH_CHECK(!mask.has_value() || mask->scalar_type() == torch::headeronly::ScalarType::Bool,
                  "mask must be bool");
  STD_TORCH_CHECK(!bias.has_value() || dtype_of(*bias, "bias") == s.dtype,
                  "bias must have q's dtype");
  check_broadcast(mask, "mask", s);
  check_broadcast(bias, "bias", s);
  s.mask = broadcast(mask);
  s.bias = broadcast(bias);
  return s;
}

struct Cpu {
  static size_t forward_workspace(const Shape& s) {
    return cpu::forward_workspace(s, torch_parallel().threads);
  }
  static size_t backward_workspace(const Shape& s) {
    return cpu::backward_workspace(s, torch_parallel().threads);
  }
  static void forward(const Forward& call, const Tensor&) { cpu::forward(call, torch_parallel()); }
  static void backward(const Backward& call, const Tensor&) {
    cpu::backward(call, torch_parallel());
  }
};

#ifdef BIGKERN_CUDA
struct Cuda {
  static size_t forward_workspace(const Shape& s) { return cuda::forward_workspace(s); }
  static size_t backward_workspace(const Shape& s) { return cuda::backward_workspace(s); }
  static void forward(const Forward& call, const Tensor& q) {
    launch_on_device(q, "attention", [&](void* stream) { return cuda::forward(call, stream); });
  }
  static void backward(const Backward& call, const Tensor& q) {
    launch_on_device(q, "attention_backward",
                     [&](void* stream) { return cuda::backward(call, stream); });
  }
};
#endif

template <class Device>
std::tuple<Tensor, Tensor> attention(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                     const OptionalTensor& mask, const OptionalTensor& bias,
                                     double scale, const std::string& causal) {
  const Shape s = shape_of(q_, k_, v_, mask, bias, scale, causal);
  const Tensor q = with_dense_rows(q_), k = with_dense_rows(k_), v = with_dense_rows(v_);
  Tensor o = empty_bshd(q, s.Hq, s.Sq, s.Dv);
  Tensor lse = empty_f32(q, {s.B, s.Hq, s.Sq});
  Tensor workspace = empty_bytes(q, Device::forward_workspace(s));
  Device::forward({s, in(q), in(k), in(v), out(o), static_cast<float*>(lse.mutable_data_ptr()),
                   workspace.mutable_data_ptr()},
                  q);
  return {o, lse};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout_, const Tensor& q_,
                                                      const Tensor& k_, const Tensor& v_,
                                                      const Tensor& o_, const Tensor& lse_,
                                                      const OptionalTensor& mask,
                                                      const OptionalTensor& bias, double scale,
                                                      const std::string& causal) {
  const Shape s = shape_of(q_, k_, v_, mask, bias, scale, causal);
  STD_TORCH_CHECK(dtype_of(dout_, "do") == s.dtype && dtype_of(o_, "o") == s.dtype &&
                      dtype_of(lse_, "lse") == Dtype::f32,
                  "do and o must have q's dtype and lse must be float32");
  STD_TORCH_CHECK(dout_.numel() == s.B * s.Hq * s.Sq * s.Dv && o_.numel() == dout_.numel() &&
                      lse_.numel() == s.B * s.Hq * s.Sq,
                  "do and o must be [B, Hq, Sq, Dv] and lse [B, Hq, Sq]");
  const Tensor dout = with_dense_rows(dout_), o = with_dense_rows(o_);
  const Tensor q = with_dense_rows(q_), k = with_dense_rows(k_), v = with_dense_rows(v_);
  const Tensor lse = torch::stable::contiguous(lse_);
  Tensor dq = empty_bshd(q, s.Hq, s.Sq, s.D);
  Tensor dk = empty_bshd(q, s.Hkv, s.Sk, s.D);
  Tensor dv = empty_bshd(q, s.Hkv, s.Sk, s.Dv);
  Tensor workspace = empty_bytes(q, Device::backward_workspace(s));
  Device::backward(
      {s, in(dout), in(q), in(k), in(v), in(o), static_cast<const float*>(lse.const_data_ptr()),
       out(dq), out(dk), out(dv), workspace.mutable_data_ptr()},
      q);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace bigkern::attention

#ifdef BIGKERN_SIMT
STABLE_TORCH_LIBRARY_IMPL(bigkern_simt, CPU, m) {
  m.impl("attention", TORCH_BOX(&bigkern::attention::attention<bigkern::attention::Cuda>));
  m.impl("attention_backward",
         TORCH_BOX(&bigkern::attention::attention_backward<bigkern::attention::Cuda>));
}
#else
STABLE_TORCH_LIBRARY_IMPL(bigkern_native, CPU, m) {
  m.impl("attention", TORCH_BOX(&bigkern::attention::attention<bigkern::attention::Cpu>));
  m.impl("attention_backward",
         TORCH_BOX(&bigkern::attention::attention_backward<bigkern::attention::Cpu>));
}
#ifdef BIGKERN_CUDA
STABLE_TORCH_LIBRARY_IMPL(bigkern_native, CUDA, m) {
  m.impl("attention", TORCH_BOX(&bigkern::attention::attention<bigkern::attention::Cuda>));
  m.impl("attention_backward",
         TORCH_BOX(&bigkern::attention::attention_backward<bigkern::attention::Cuda>));
}
#endif
#endif
