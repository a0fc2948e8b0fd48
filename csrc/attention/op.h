// From tensors to the contract's structs: checks, views, strides. A part of op.cpp.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention/attention.h"
#include "common/op.h"

namespace bigkern::attention {
namespace {

// ---- arguments ----------------------------------------------------------------------------------

struct HeadRules {
  Arguments& in;
  OptionalTensor alibi_slopes = in.optional(), sinks = in.optional();
};

struct ScoreRules {
  Arguments& in;
  double scale = in.real();
  std::string causal = in.text();
  int64_t window_left = in.integer(), window_right = in.integer();
  double softcap = in.real();
};

struct Rules {
  Arguments& in;
  OptionalTensor mask = in.optional(), bias = in.optional();
  HeadRules heads{in};
  OptionalTensor dropout_key = in.optional();
  OptionalTensor cu_seqlens_q = in.optional(), cu_seqlens_k = in.optional();
  ScoreRules scores{in};
  double dropout_p = in.real();
  int64_t max_seqlen_q = in.integer(), max_seqlen_k = in.integer();
};

struct ForwardCall {
  Arguments& in;
  Tensor q = in.tensor(), k = in.tensor(), v = in.tensor();
  Rules rules{in};
};

struct BackwardCall {
  Arguments& in;
  Tensor do_ = in.tensor();  // do is a keyword
  OptionalTensor dlse = in.optional();
  Tensor q = in.tensor(), k = in.tensor(), v = in.tensor(), o = in.tensor(), lse = in.tensor();
  bool want_bias = in.flag();
  Rules rules{in};
};

// The cache is contiguous, [B, Hkv, S, D], or, with a page table, [pages, Hkv, page_size, D].
struct DecodeCall {
  Arguments& in;
  Tensor q = in.tensor(), k_cache = in.tensor(), v_cache = in.tensor();
  Tensor cache_seqlens = in.tensor();
  OptionalTensor page_table = in.optional();
  HeadRules heads{in};
  ScoreRules scores{in};
};

// ---- views --------------------------------------------------------------------------------------

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
Tensor empty_bshd(const Tensor& like, int64_t H, int64_t S, int64_t D) {
  return empty_strided(like, {like.size(0), H, S, D}, {S * H * D, D, H * D, 1},
                       torch_dtype_of(like));
}

// mask or bias, checked but for its dtype.
void check_broadcast(const OptionalTensor& x, const char* name, const Shape& s, const First& q) {
  if (!x.has_value()) return;
  check_place(*x, name, q);
  const auto fits = [&](int d, int64_t size) { return x->size(d) == 1 || x->size(d) == size; };
  require(x->dim() == 4 && fits(0, s.B) && fits(1, s.Hq) && fits(2, s.Sq) && fits(3, s.Sk), name,
          " must have four dimensions that broadcast to [B, Hq, Sq, Sk]");
}

PerHead per_head(const OptionalTensor& x, const char* name, const Shape& s, const First& q) {
  if (!x.has_value()) return {nullptr, 0};
  const bool batches = x->dim() == 2;
  require(dtype_of(*x, name) == Dtype::f32 && x->is_contiguous() &&
              (batches ? x->sizes() == Dims({s.B, s.Hq}) : x->sizes() == Dims({s.Hq})),
          name, " must be contiguous float32, [Hq] or [B, Hq]");
  check_place(*x, name, q);
  return {data_of<float>(x), batches ? s.Hq : 0};
}

void check_int32(const Tensor& x, const char* name, const char* form, bool right_form,
                 const First& q) {
  require(x.scalar_type() == torch::headeronly::ScalarType::Int && x.is_contiguous() && right_form,
          name, " must be contiguous int32, ", form);
  check_place(x, name, q);
}

// ---- lengths and page numbers: what a kernel reads and writes by, so that they must be right. On
// a GPU they are trusted: looking at them would wait for it.

// Where packed sequences begin, in `total` rows; null where they are not packed.
const int32_t* begins_of(const OptionalTensor& x, const char* name, int64_t total, const First& q) {
  if (!x.has_value()) return nullptr;
  check_int32(*x, name, "[sequences + 1]", x->dim() == 1 && x->numel() > 0, q);
  const int32_t* const begins = data_of<int32_t>(x);
  if (!x->is_cpu()) return begins;
  const int64_t B = x->numel() - 1;
  require(begins[0] == 0 && begins[B] == total, name, " must run from 0 to ", total,
          ", the rows there are, not ", begins[0], "..", begins[B]);
  for (int64_t b = 0; b < B; ++b) {
    require(begins[b] <= begins[b + 1], name, " must not fall, but it does from ", begins[b],
            " to ", begins[b + 1]);
  }
  return begins;
}

// The rows that a sequence can have at most, as the caller says.
int64_t longest_of(const Tensor& cu_seqlens, int64_t given, const char* name, int64_t total) {
  int64_t longest = 0;
  if (cu_seqlens.is_cpu()) {
    const auto* const begins = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
    for (int64_t b = 0; b + 1 < cu_seqlens.numel(); ++b)
      longest = std::max<int64_t>(longest, begins[b + 1] - begins[b]);
  }
  require(given >= longest, name, " must be at least ", longest,
          ", the longest sequence there is, not ", given);
  return std::min(given, total);
}

// The lengths [B] of cached sequences: at most the keys that the cache has room for.
const int32_t* lengths_of(const Tensor& x, const Shape& s, const First& q) {
  check_int32(x, "cache_seqlens", "[B]", x.sizes() == Dims({s.B}), q);
  const auto* const lengths = static_cast<const int32_t*>(x.const_data_ptr());
  if (!x.is_cpu()) return lengths;
  for (int64_t b = 0; b < s.B; ++b) {
    require(lengths[b] >= 0 && lengths[b] <= s.Sk,
            "cache_seqlens must be within 0 and the cache's ", s.Sk, " keys, not ", lengths[b]);
  }
  return lengths;
}

// Page numbers [B, pages of a sequence]: those that the lengths ask for must be pages of the cache.
void check_pages(const Tensor& page_table, const int32_t* lengths, const Tensor& k_cache) {
  if (!page_table.is_cpu()) return;
  const auto* row = static_cast<const int32_t*>(page_table.const_data_ptr());
  const int64_t pages = k_cache.size(0), page_size = k_cache.size(2), width = page_table.size(1);
  for (int64_t b = 0; b < page_table.size(0); ++b, row += width) {
    for (int64_t page = 0; page * page_size < lengths[b]; ++page) {
      require(row[page] >= 0 && row[page] < pages, "page_table must hold page numbers below ",
              pages, ", not ", row[page]);
    }
  }
}

// ---- a call's shape -----------------------------------------------------------------------------

// Whom a query head sees, and how it scores them.
void set_scores(Shape& s, const HeadRules& heads, const ScoreRules& rules, const First& q) {
  require(s.Sq < kMaxLength && s.Sk < kMaxLength, "sequences must be shorter than 2^30");
  require(s.Hkv > 0 && s.Hq % s.Hkv == 0, "q's heads must be a multiple of k's");
  require(s.D <= kMaxHeadDim && s.Dv <= kMaxHeadDim, "head_dim must be at most ", kMaxHeadDim);
  s.scale = static_cast<float>(rules.scale), s.softcap = static_cast<float>(rules.softcap);
  require(rules.causal == "none" || rules.causal == "top_left" || rules.causal == "bottom_right",
          "causal must be none, top_left or bottom_right, not ", rules.causal);
  s.corner = rules.causal == "top_left" ? Corner::top_left : Corner::bottom_right;
  const auto side = [](int64_t n) { return n < 0 ? kUnlimited : std::min(n, kUnlimited); };
  s.left = side(rules.window_left), s.right = side(rules.window_right);
  s.slopes = per_head(heads.alibi_slopes, "alibi_slopes", s, q);
  s.sinks = per_head(heads.sinks, "sinks", s, q);
}

void set_masks(Shape& s, const Rules& rules, const First& q) {
  const OptionalTensor &mask = rules.mask, &bias = rules.bias;
  require(!mask.has_value() || mask->scalar_type() == torch::headeronly::ScalarType::Bool,
          "mask must be bool");
  require(!bias.has_value() || dtype_of(*bias, "bias") == s.dtype, "bias must have q's dtype");
  check_broadcast(mask, "mask", s, q);
  check_broadcast(bias, "bias", s, q);
  if (mask.has_value()) s.mask = broadcast(*mask, mask->const_data_ptr());
  if (bias.has_value()) s.bias = broadcast(*bias, bias->const_data_ptr());
}

// q's, k's and v's part; k and v may be a cache, whose first and third sizes are its own.
Shape sizes_of(const First& q, const Tensor& k, const Tensor& v, const char* k_name,
               const char* v_name) {
  const Tensor& q_ = q.tensor;
  require(q_.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, ", k_name, " and ", v_name,
          " must be [B, H, S, D]");
  Shape s{};
  s.dtype = q.dtype;
  s.B = q_.size(0), s.Hq = q_.size(1), s.Sq = q_.size(2), s.D = q_.size(3);
  s.Hkv = k.size(1), s.Sk = k.size(2), s.Dv = v.size(3);
  check(k, k_name, q, {k.size(0), s.Hkv, s.Sk, s.D});
  check(v, v_name, q, {k.size(0), s.Hkv, s.Sk, s.Dv});
  return s;
}

Shape shape_of(const First& q, const Tensor& k, const Tensor& v, const Rules& rules) {
  Shape s = sizes_of(q, k, v, "k", "v");
  require(k.size(0) == s.B, "q and k must have one batch size");
  const OptionalTensor &q_ends = rules.cu_seqlens_q, &k_ends = rules.cu_seqlens_k;
  s.q_begins = begins_of(q_ends, "cu_seqlens_q", s.Sq, q);
  s.k_begins = begins_of(k_ends, "cu_seqlens_k", s.Sk, q);
  if (s.q_begins != nullptr || s.k_begins != nullptr) {
    require(s.q_begins != nullptr && s.k_begins != nullptr && s.B == 1 &&
                q_ends->size(0) == k_ends->size(0),
            "packed sequences need cu_seqlens_q and cu_seqlens_k of one size, and a batch of 1");
    require(!rules.mask.has_value() && !rules.bias.has_value(),
            "packed sequences have neither mask nor bias");
    s.B = q_ends->size(0) - 1;
    s.total_q = s.Sq;
    s.Sq = longest_of(*q_ends, rules.max_seqlen_q, "max_seqlen_q", s.Sq);
    s.Sk = longest_of(*k_ends, rules.max_seqlen_k, "max_seqlen_k", s.Sk);
  }
  set_scores(s, rules.heads, rules.scores, q);
  set_masks(s, rules, q);
  s.dropout = dropout_of(rules.dropout_key, rules.dropout_p);
  return s;
}

Shape shape_of(const First& q, const DecodeCall& call) {
  const Tensor& k_cache = call.k_cache;
  const OptionalTensor& page_table = call.page_table;
  Shape s = sizes_of(q, k_cache, call.v_cache, "k_cache", "v_cache");
  if (page_table.has_value()) {
    check_int32(*page_table, "page_table", "[B, pages of a sequence]",
                page_table->dim() == 2 && page_table->size(0) == s.B, q);
    s.Sk *= page_table->size(1);
  } else {
    require(k_cache.size(0) == s.B, "q and k_cache must have one batch size");
  }
  set_scores(s, call.heads, call.scores, q);
  return s;
}

}  // namespace
}  // namespace bigkern::attention
