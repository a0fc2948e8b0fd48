// From tensors to the contract's structs: checks, views, strides. A part of op.cpp.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention/attention.h"
#include "common/op.h"

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

bool is_int32(const Tensor& x) {
  return x.scalar_type() == torch::headeronly::ScalarType::Int && x.is_contiguous();
}

const int32_t* begins_of(const OptionalTensor& x, const char* name) {
  if (!x.has_value()) return nullptr;
  STD_TORCH_CHECK(is_int32(*x) && x->dim() == 1 && x->size(0) > 0, name,
                  " must be contiguous int32, [sequences + 1]");
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

// The rules' part of a shape whose sizes are known.
void set_rules(Shape& s, const Rules& rules) {
  STD_TORCH_CHECK(s.Sq < kMaxLength && s.Sk < kMaxLength, "sequences must be shorter than 2^30");
  STD_TORCH_CHECK(s.Hkv > 0 && s.Hq % s.Hkv == 0, "q's heads must be a multiple of k's");
  STD_TORCH_CHECK(s.D <= kMaxHeadDim && s.Dv <= kMaxHeadDim, "head_dim must be at most ",
                  kMaxHeadDim);
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
}

// q's, k's and v's part; k and v may be a cache, whose first and third sizes are its own.
Shape sizes_of(const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must be [B, H, S, D]");
  Shape s{};
  s.dtype = dtype_of(q, "q");
  STD_TORCH_CHECK(dtype_of(k, "k") == s.dtype && dtype_of(v, "v") == s.dtype,
                  "q, k and v must have one dtype");
  s.B = q.size(0), s.Hq = q.size(1), s.Sq = q.size(2), s.D = q.size(3);
  s.Hkv = k.size(1), s.Sk = k.size(2), s.Dv = v.size(3);
  STD_TORCH_CHECK(
      k.size(3) == s.D && v.size(0) == k.size(0) && v.size(1) == s.Hkv && v.size(2) == s.Sk,
      "q, k and v must agree in batch, key heads, key length and head_dim");
  return s;
}

Shape shape_of(const Tensor& q, const Tensor& k, const Tensor& v, const Rules& rules) {
  Shape s = sizes_of(q, k, v);
  STD_TORCH_CHECK(k.size(0) == s.B, "q and k must have one batch size");
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
    s.total_q = s.Sq;
    s.Sq = std::min(s.Sq, rules.max_seqlen_q), s.Sk = std::min(s.Sk, rules.max_seqlen_k);
  }
  set_rules(s, rules);
  return s;
}

// The cache's keys and values: contiguous, [B, Hkv, S, D], or pages [pages, Hkv, page_size, D].
Shape decode_shape_of(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                      const OptionalTensor& page_table, const Rules& rules) {
  Shape s = sizes_of(q, k_cache, v_cache);
  if (page_table.has_value()) {
    STD_TORCH_CHECK(is_int32(*page_table) && page_table->dim() == 2 && page_table->size(0) == s.B,
                    "page_table must be contiguous int32, [B, pages of a sequence]");
    s.Sk *= page_table->size(1);
  } else {
    STD_TORCH_CHECK(k_cache.size(0) == s.B, "q and k_cache must have one batch size");
  }
  set_rules(s, rules);
  return s;
}

}  // namespace
}  // namespace bigkern::attention
