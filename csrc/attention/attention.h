// The attention op's C++ contract: raw pointers, sizes, strides. No torch.
//
//   s = scale * q k^T + bias, -inf where mask or causal forbid     lse = log sum exp s     o =
//   exp(s - lse) v
//
// Launchers allocate nothing and check nothing but what they themselves cannot run; op.cpp has
// checked the rest. A row with nothing to attend to gives o = 0, lse = -inf and zero gradients.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtypes.h"
#include "common/parallel.h"

namespace bigkern::attention {

enum class Causal : int { none, top_left, bottom_right };

constexpr int64_t kMaxHeadDim = 256;

// A [B, H, S, D] tensor whose last stride is 1; the other strides count elements.
template <class Pointer>
struct View {
  Pointer data;
  int64_t batch, head, row;
};

// A [B, Hq, Sq, Sk] tensor with any strides, 0 where it is broadcast; null where there is none.
struct Broadcast {
  const void* data;
  int64_t batch, head, row, column;
};

struct Shape {
  Dtype dtype;
  int64_t B, Hq, Hkv, Sq, Sk, D, Dv;
  float scale;
  Causal causal;
  Broadcast mask;  // bool, one byte each, true where q may look
  Broadcast bias;  // dtype

  // Query i sees keys j <= i + diagonal() where causal is not none.
  int64_t diagonal() const { return causal == Causal::bottom_right ? Sk - Sq : 0; }
};

struct Forward {
  Shape shape;
  View<const void*> q, k, v;
  View<void*> o;
  float* lse;  // [B, Hq, Sq]
  void* workspace;
};

struct Backward {
  Shape shape;
  View<const void*> dout, q, k, v, o;
  const float* lse;  // [B, Hq, Sq]
  View<void*> dq, dk, dv;
  void* workspace;
};

namespace cpu {
size_t forward_workspace(const Shape& shape, int threads);
size_t backward_workspace(const Shape& shape, int threads);
void forward(const Forward& call, const Parallel& parallel);
void backward(const Backward& call, const Parallel& parallel);
}  // namespace cpu

// Launchers return a cudaError_t as an int, 0 for success, so that this header needs no CUDA.
namespace cuda {
size_t forward_workspace(const Shape& shape);
size_t backward_workspace(const Shape& shape);
int forward(const Forward& call, void* stream);
int backward(const Backward& call, void* stream);
}  // namespace cuda

}  // namespace bigkern::attention
