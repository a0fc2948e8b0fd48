// The attention op's C++ contract: raw pointers, sizes, strides. No torch.
//
//   x = scale q k^T          x = softcap tanh(x / softcap), if asked
//   s = x + bias - slope |i + offset - j|, -inf where the mask or the window forbid
//   lse = log (sum exp s + exp sink)        p = exp(s - lse)        o = (dropped p) v
//
// Query i of a sequence stands at its key i + offset: the sliding window, the causal rule (a window
// that ends there) and ALiBi's distances are counted from it. Without a rule or a sink a row may
// see nothing: then o = 0, lse = -inf and all its gradients are 0.
//
// Sequences are dense, [B, H, S, D], or packed behind each other in the rows of one [H, total, D].
//
// Launchers allocate nothing and check nothing but what they themselves cannot run; op.cpp has
// checked the rest.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dropout.h"
#include "common/dtypes.h"
#include "common/parallel.h"

namespace bigkern::attention {

// Where a sequence's first query stands: at its first key, or so that its last query stands at its
// last key.
enum class Corner : int { top_left, bottom_right };

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxLength = 1 << 30;     // of a sequence: sums of two indices fit into an int
constexpr int64_t kUnlimited = kMaxLength;  // a side of a window

// A [B, H, S, D] tensor whose last stride is 1; the other strides count elements. Packed: batch =
// 0.
template <class Pointer>
struct View {
  Pointer data;
  int64_t batch, head, row;
};

// A [B, Hq, Sq, Sk] tensor with any strides, 0 where it is broadcast; null where there is none.
template <class Pointer>
struct Broadcast {
  Pointer data;
  int64_t batch, head, row, column;
};

// [B, Hq, Sq] fp32, rows dense.
template <class Pointer>
struct Statistic {
  Pointer data;
  int64_t batch, head;
};

// Float32 numbers of each query head, [B, Hq]; null where there are none.
struct PerHead {
  const float* data;
  int64_t batch;  // 0: the same for all batches
};

// The rows of one sequence, and where its first query stands.
struct Sequence {
  int64_t q_begin, k_begin, Sq, Sk, offset;
};

struct Shape {
  Dtype dtype;
  int64_t B, Hq, Hkv, Sq, Sk, D, Dv;  // Sq and Sk: of the longest sequence
  float scale, softcap;               // softcap 0: none
  Corner corner;
  int64_t left, right;          // query i sees keys i + offset - left .. i + offset + right
  Broadcast<const void*> mask;  // bool, one byte each, true where q may look
  Broadcast<const void*> bias;  // dtype
  PerHead slopes, sinks;        // ALiBi; a logit that takes part in the row's sum only
  Dropout dropout;
  const int32_t *q_begins, *k_begins;  // packed: sequence b is rows begins[b] .. begins[b + 1]
  int64_t total_q;                     // packed: the rows of q in all

  BIGKERN_HD Sequence sequence(int64_t b) const {
    Sequence s{0, 0, Sq, Sk, 0};
    if (q_begins != nullptr) {
      s.q_begin = q_begins[b], s.Sq = q_begins[b + 1] - s.q_begin;
      s.k_begin = k_begins[b], s.Sk = k_begins[b + 1] - s.k_begin;
    }
    s.offset = corner == Corner::bottom_right ? s.Sk - s.Sq : 0;
    return s;
  }

  BIGKERN_HD int64_t rows_of_q() const { return q_begins != nullptr ? total_q : B * Sq; }

  // Whether a score depends on more than its dot product and the window.
  bool general() const {
    return softcap != 0 || mask.data != nullptr || bias.data != nullptr || slopes.data != nullptr ||
           dropout.active();
  }
};

struct Forward {
  Shape shape;
  View<const void*> q, k, v;
  View<void*> o;
  Statistic<float*> lse;
  void* workspace;
};

struct Backward {
  Shape shape;
  View<const void*> dout, q, k, v, o;
  Statistic<const float*> lse;
  Statistic<const float*> dlse;  // the gradient of lse; null: 0
  View<void*> dq, dk, dv;
  Broadcast<void*> dbias;  // strides 0 where bias is broadcast: there it is a sum; null: not asked
  void* workspace;
};

// Generation: a few queries, the last of their sequence, against a cache of keys and values.
struct Pages {
  const int32_t* table;  // [B, row]: the page that holds keys n page_size .. of sequence b
  int64_t row, page_size;
};

struct Decode {
  Shape shape;                // Sk: the longest length there can be; neither packed nor dropped
  View<const void*> q, k, v;  // k, v [B, Hkv, Sk, D], or [pages, Hkv, page_size, D]
  const int32_t* lengths;     // [B] keys of each sequence, on the device of q
  Pages pages;                // table null: k and v are contiguous
  View<void*> o;
  Statistic<float*> lse;
  void* workspace;
};

namespace cpu {
size_t forward_workspace(const Shape& shape, int threads);
size_t backward_workspace(const Shape& shape, int threads);
size_t decode_workspace(const Shape& shape, int threads);
void forward(const Forward& call, const Parallel& parallel);
void backward(const Backward& call, const Parallel& parallel);
void decode(const Decode& call, const Parallel& parallel);
}  // namespace cpu

// Launchers return a cudaError_t as an int, 0 for success, so that this header needs no CUDA.
namespace cuda {
size_t forward_workspace(const Shape& shape);
size_t backward_workspace(const Shape& shape);
size_t decode_workspace(const Shape& shape);
int forward(const Forward& call, void* stream);
int backward(const Backward& call, void* stream);
int decode(const Decode& call, void* stream);
}  // namespace cuda

}  // namespace bigkern::attention
