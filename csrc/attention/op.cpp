// Attention as a torch op: check, allocate, launch.
#include "common/op.h"

#include <algorithm>
#include <cmath>

#include "attention/attention.h"

namespace bigkern::attention {
namespace {

// The batch stride is 0 where there is one batch only, which packed sequences share.
template <class Pointer>
View<Pointer> view(const Tensor& x, Pointer data) {
  return {data, x.size(0) == 1 ? 0 : x.stride(0), x.stride(1), x.stride(2)};
}

View<const void*> in(const Tensor& x) { return view<const void*>(x, x.const_data_ptr()); }
View<void*> out(const Tensor& x) { return view<void*>(x, x.mutable_data_ptr()); }

// The strides of a tensor that broadcasts to [B, Hq, Sq, Sk].
template <class Pointer>
Broadcast<Pointer> broadcast(const Tensor& x, Pointer data) {
  int64_t strides[4];
  for (int d = 0; d < 4; ++d) strides[d] = x.size(d) == 1 ? 0 : x.stride(d);
  return {data, strides[0], strides[1], strides[2], strides[3]};
}

template <class T>
const T* data_of(const OptionalTensor& x) {
  return x.has_value() ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

// [B, H, S]
template <class Pointer>
Statistic<Pointer> statistic(const Tensor& x, Pointer data) {
  return {data, x.size(0) == 1 ? 0 : x.size(1) * x.size(2), x.size(2)};
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
  const auto fits = [&](int d, int64_t size) { return x->size(d) == 1 || x->size(d) == size; };
  STD_TORCH_CHECK(x->dim() == 4 && fits(0, s.B) && fits(1, s.Hq) && fits(2, s.Sq) && fits(3, s.Sk),
                  name, " must have four dimensions that broadcast to [B, Hq, Sq, Sk]");
}

PerHead per_head(const OptionalTensor& x, const char* name, const Shape& s) {
  if (!x.has_value()) return {nullptr, 0};
  STD_TORCH_CHECK(dtype_of(*x, name) == Dtype::f32 && x->is_contiguous() &&
                      x->size(x->dim() - 1) == s.Hq &&
                      (x->dim() == 1 || (x->dim() == 2 && x->size(0) == s.B)),
                  name, " must be contiguous float32, [Hq] or [B, Hq]");
  return {data_of<float>(x), x->dim() == 2 ? s.Hq : 0};
}

Dropout dropout_of(const OptionalTensor& key, double p) {
  if (!key.has_value()) return {0, 0, 0, 1.0f};
  STD_TORCH_CHECK(key->scalar_type() == torch::headeronly::ScalarType::Long && key->is_cpu() &&
                      key->numel() == 2 && key->is_contiguous(),
                  "dropout_key must be two int64 numbers on the CPU");
  STD_TORCH_CHECK(p >= 0 && p < 1, "dropout_p must be in [0, 1), not ", p);
  const int64_t* keys = data_of<int64_t>(key);
  const double threshold = std::min(std::nearbyint(p * 4294967296.0), 4294967295.0);
  return {static_cast<uint32_t>(keys[0]), static_cast<uint32_t>(keys[1]),
          static_cast<uint32_t>(threshold), static_cast<float>(1 / (1 - p))};
}

const int32_t* begins_of(const OptionalTensor& x, const char* name) {
  if (!x.has_value()) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == torch::headeronly::ScalarType::Int && x->dim() == 1 &&
                      x->size(0) > 0 && x->is_contiguous(),
                  name, " must be contiguous int32, [sequences + 1]");
  return data_of<int32_t>(x);
}

// The op's arguments besides q, k and v, as the schema lists them.
struct Rules {
  const OptionalTensor &mask, &bias, &alibi_slopes, &sinks, &dropout_key;
  const OptionalTensor &cu_seqlens_q, &cu_seqlens_k;
  double scale;
  const std::string& causal;
  int64_t window_left, window_right;
  double softcap, dropout_p;
  int64_t max_seqlen_q, max_seqlen_k;
};

Shape shape_of(const Tensor& q, const Tensor& k, const Tensor& v, const Rules& rules) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must be [B, H, S, D]");
  Shape s{};
  s.dtype = dtype_of(q, "q");
  s.B = q.size(0), s.Hq = q.size(1), s.Sq = q.size(2), s.D = q.size(3);
  s.Hkv = k.size(1), s.Sk = k.size(2), s.Dv = v.size(3);
  STD_TORCH_CHECK(dtype_of(k, "k") == s.dtype && dtype_of(v, "v") == s.dtype,
                  "q, k and v must have one dtype");
  STD_TORCH_CHECK(k.size(0) == s.B && k.size(3) == s.D && v.size(0) == s.B && v.size(1) == s.Hkv &&
                      v.size(2) == s.Sk,
                  "q, k and v must agree in batch, key heads, key length and head_dim");
  STD_TORCH_CHECK(s.Hkv > 0 && s.Hq % s.Hkv == 0, "q's heads must be a multiple of k's");
  STD_TORCH_CHECK(s.D <= kMaxHeadDim && s.Dv <= kMaxHeadDim, "head_dim must be at most ",
                  kMaxHeadDim);
  s.q_begins = begins_of(rules.cu_seqlens_q, "cu_seqlens_q");
  s.k_begins = begins_of(rules.cu_seqlens_k, "cu_seqlens_k");
  if (s.q_begins != nullptr || s.k_begins != nullptr) {
    STD_TORCH_CHECK(
        s.q_begins != nullptr && s.k_begins != nullptr && s.B == 1 &&
            rules.cu_seqlens_q->size(0) == rules.cu_seqlens_k->size(0),
        "packed sequences need cu_seqlens_q and cu_seqlens_k of one size, and a batch of 1");
    STD_TORCH_CHECK(!rules.mask.has_value() && !rules.bias.has_value(),
                    "packed sequences have neither mask nor bias");
    s.B = rules.cu_seqlens_q->size(0) - 1;
    s.Sq = std::min(s.Sq, rules.max_seqlen_q), s.Sk = std::min(s.Sk, rules.max_seqlen_k);
  }
  STD_TORCH_CHECK(s.Sq < kMaxLength && s.Sk < kMaxLength, "sequences must be shorter than 2^30");
  s.scale = static_cast<float>(rules.scale), s.softcap = static_cast<float>(rules.softcap);
  STD_TORCH_CHECK(
      rules.causal == "none" || rules.causal == "top_left" || rules.causal == "bottom_right",
      "causal must be none, top_left or bottom_right, not ", rules.causal);
  s.corner = rules.causal == "top_left" ? Corner::top_left : Corner::bottom_right;
  const auto side = [](int64_t n) { return n < 0 ? kUnlimited : std::min(n, kUnlimited); };
  s.left = side(rules.window_left), s.right = side(rules.window_right);
  STD_TORCH_CHECK(
      !rules.mask.has_value() || rules.mask->scalar_type() == torch::headeronly::ScalarType::Bool,
      "mask must be bool");
  STD_TORCH_CHECK(!rules.bias.has_value() || dtype_of(*rules.bias, "bias") == s.dtype,
                  "bias must have q's dtype");
  check_broadcast(rules.mask, "mask", s);
  check_broadcast(rules.bias, "bias", s);
  if (rules.mask.has_value()) s.mask = broadcast(*rules.mask, rules.mask->const_data_ptr());
  if (rules.bias.has_value()) s.bias = broadcast(*rules.bias, rules.bias->const_data_ptr());
  s.slopes = per_head(rules.alibi_slopes, "alibi_slopes", s);
  s.sinks = per_head(rules.sinks, "sinks", s);
  s.dropout = dropout_of(rules.dropout_key, rules.dropout_p);
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
                                     const OptionalTensor& alibi_slopes,
                                     const OptionalTensor& sinks, const OptionalTensor& dropout_key,
                                     const OptionalTensor& cu_seqlens_q,
                                     const OptionalTensor& cu_seqlens_k, double scale,
                                     const std::string& causal, int64_t window_left,
                                     int64_t window_right, double softcap, double dropout_p,
                                     int64_t max_seqlen_q, int64_t max_seqlen_k) {
  const Shape s =
      shape_of(q_, k_, v_,
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
  const Shape s =
      shape_of(q_, k_, v_,
               {mask, bias, alibi_slopes, sinks, dropout_key, cu_seqlens_q, cu_seqlens_k, scale,
                causal, window_left, window_right, softcap, dropout_p, max_seqlen_q, max_seqlen_k});
  const int64_t rows = q_.size(0) * s.Hq * q_.size(2);
  STD_TORCH_CHECK(dtype_of(dout_, "do") == s.dtype && dtype_of(o_, "o") == s.dtype &&
                      dtype_of(lse_, "lse") == Dtype::f32,
                  "do and o must have q's dtype and lse must be float32");
  STD_TORCH_CHECK(
      dout_.numel() == rows * s.Dv && o_.numel() == dout_.numel() && lse_.numel() == rows,
      "do and o must be [B, Hq, Sq, Dv] and lse [B, Hq, Sq]");
  STD_TORCH_CHECK(
      !dlse_.has_value() || (dtype_of(*dlse_, "dlse") == Dtype::f32 && dlse_->numel() == rows),
      "dlse must be float32 [B, Hq, Sq]");
  STD_TORCH_CHECK(!bias_grad || bias.has_value(), "bias_grad needs a bias");
  const Tensor dout = with_dense_rows(dout_), o = with_dense_rows(o_);
  const Tensor q = with_dense_rows(q_), k = with_dense_rows(k_), v = with_dense_rows(v_);
  const Tensor lse = torch::stable::contiguous(lse_);
  const OptionalTensor dlse =
      dlse_.has_value() ? OptionalTensor(torch::stable::contiguous(*dlse_)) : std::nullopt;
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
                statistic(lse, data_of<float>(dlse)),
                out(dq),
                out(dk),
                out(dv),
                {},
                workspace.mutable_data_ptr()};
  if (bias_grad) call.dbias = broadcast(dbias, dbias.mutable_data_ptr());
  Device::backward(call, q);
  return {dq, dk, dv, dbias};
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
