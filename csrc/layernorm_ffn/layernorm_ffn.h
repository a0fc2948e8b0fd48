// The C++ contract of the norm and FFN ops: raw pointers and sizes. No torch.
//
//   pre-norm    y = (x +) drop(W2 drop(act(W1 norm(x) + b1)) + b2)
//   post-norm   s = (x +) drop(W2 drop(act(W1 x + b1)) + b2)      y = norm(s)
//   no norm     y = (x +) drop(W2 drop(act(W1 x + b1)) + b2)
//
// Every matrix is row-major and contiguous: x [M, D] is M tokens, W1 [F, D] and W2 [D, F] are laid
// out like torch.nn.Linear's weights. Statistics, accumulators and gradient sums are fp32; storage
// is one dtype. Launchers allocate nothing: ask the matching *_workspace for the bytes first.
// Nothing is checked here but what a kernel itself cannot run; op.cpp has checked the rest.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dropout.h"
#include "common/dtypes.h"
#include "common/parallel.h"

namespace bigkern::layernorm_ffn {

enum class Norm : int { layer, rms, none };  // none: the whole block only

// The gated ones split the product in two halves: act(gate) * up, with silu or the exact gelu.
enum class Activation : int { relu, gelu, gelu_tanh, silu, swiglu, geglu };

enum class Placement : int { pre, post };

constexpr bool is_gated(Activation a) { return a == Activation::swiglu || a == Activation::geglu; }

// The heads of the generator: which dropout of an op it is. Element (m, n) is row m, column n.
constexpr uint32_t kOutput = 0, kHidden = 1;

// ---- norm: y = (v - mean) * rstd * weight + bias over rows of N, v = x or drop(x) + residual ----

struct NormParams {
  Dtype dtype;
  int64_t M, N;
  Norm norm;  // rms: mean is not subtracted, rstd = 1 / sqrt(mean(v^2) + eps)
  float eps;
  const void* x;         // [M, N]
  const void* residual;  // [M, N], null ok
  const void* weight;    // [N], null ok: 1
  const void* bias;      // [N], null ok: 0
  void* y;               // [M, N]
  void* sum;             // [M, N] drop(x) + residual rounded to dtype, which is what is normalised;
                         // null exactly when residual is
  float* mean;           // [M], null for rms; null ok: not wanted
  float* rstd;           // [M], null ok: not wanted
  Dropout dropout;       // of x, head kOutput; only with a residual
};

struct NormBackwardParams {
  Dtype dtype;
  int64_t M, N;
  Norm norm;
  const void* dy;      // [M, N]
  const void* dsum;    // [M, N] gradient arriving at `sum` by another way, added to ds; null ok
  const void* s;       // [M, N] what was normalised: x, or sum
  const void* weight;  // [N], null ok: 1
  const float* mean;   // [M], null for rms
  const float* rstd;   // [M]
  void* ds;            // [M, N] the gradient of residual, and without dropout of x
  void* dx;            // [M, N] with dropout: drop(ds); null without
  void* dweight;       // [N], null ok: not wanted
  void* dbias;         // [N], null ok: not wanted
  void* workspace;
  Dropout dropout;
};

// ---- the passes around products that a library made ---------------------------------------------

struct BiasActivationParams {
  Dtype dtype;
  int64_t M, F;
  Activation activation;
  const void* product;  // [M, F], or [M, 2F] gated: gate, then up
  const void* bias;     // [F] or [2F], null ok
  void* preactivation;  // shaped like product: product + bias rounded to dtype; may alias product;
                        // null ok: not wanted
  void* out;            // [M, F] drop(act(product + bias))
  Dropout dropout;      // head kHidden
};

struct BiasActivationBackwardParams {
  Dtype dtype;
  int64_t M, F;
  Activation activation;
  const void* dout;           // [M, F] before the activation's dropout is undone
  const void* preactivation;  // [M, F] or [M, 2F]
  void* dpre;                 // shaped like preactivation, may alias it
  void* out;                  // [M, F] the activation rebuilt, null ok: not wanted
  void* dbias;                // [F] or [2F], null ok: not wanted
  void* workspace;
  Dropout dropout;
};

// out = drop(x) (+ residual), head kOutput: around the second product, and for its backward.
struct DropoutAddParams {
  Dtype dtype;
  int64_t M, N;
  const void* x;         // [M, N]
  const void* residual;  // [M, N], null ok
  void* out;             // [M, N], may alias x
  Dropout dropout;
};

// ---- the whole block (CPU backend) --------------------------------------------------------------

struct FfnParams {
  Dtype dtype;
  int64_t M, D, F;
  Norm norm;
  Activation activation;
  Placement placement;
  bool residual;
  float eps;
  const void* x;            // [M, D]
  const void* norm_weight;  // [D], null ok: 1
  const void* norm_bias;    // [D], null ok: 0
  const void* w1;           // [F, D], or [2F, D] gated: gate rows, then up rows
  const void* b1;           // [F] or [2F], null ok
  const void* w2;           // [D, F]
  const void* b2;           // [D], null ok
  void* y;                  // [M, D]
  float* mean;              // [M], null ok: not wanted; always null but for layer
  float* rstd;              // [M], null ok: not wanted; always null for none
  void* preactivation;      // [M, F] or [M, 2F], null ok: not wanted
  void* s;                  // [M, D] post-norm only: what is normalised, null ok: not wanted
  void* workspace;
  Dropout dropout;         // of the second product, head kOutput
  Dropout hidden_dropout;  // of the activation, head kHidden
  // Frozen weights: int8 where there are scales, w = q * scale[row]; packed where there are panels,
  // which are read in the weight's place.
  const float* w1_scale = nullptr;  // [F] or [2F], null: w1 is of dtype
  const float* w2_scale = nullptr;  // [D], null: w2 is of dtype
  const void* w1_panels = nullptr;  // what pack_weight made of w1, null ok
  const void* w2_panels = nullptr;  // of w2, null ok
  // Weights that lie in memory as [D, F] and [F, D], as GPT-2's do. Neither gated nor frozen.
  bool w1_transposed = false, w2_transposed = false;
};

// How a weight of y = x W^T is stored: a frozen one may be int8, as no activation ever is.
enum class WeightDtype : int { f32, bf16, f16, i8 };

constexpr WeightDtype weight_dtype_of(Dtype dtype) {
  return static_cast<WeightDtype>(static_cast<int>(dtype));
}

// A frozen weight as the panels that the product reads: what depends on the instruction set alone.
struct PackWeightParams {
  WeightDtype dtype;
  int64_t rows, columns;  // of the weight
  bool gated;             // its first half of rows are gates: w1 of a gated activation
  const void* weight;     // [rows, columns]
  void* panels;           // packed_elements() of the weight's dtype
};

struct FfnBackwardParams {
  Dtype dtype;
  int64_t M, D, F;
  Norm norm;
  Activation activation;
  Placement placement;
  bool residual;
  const void* dy;             // [M, D]
  const void* x;              // [M, D]
  const void* norm_weight;    // [D], null ok
  const void* norm_bias;      // [D], null ok
  const void* w1;             // [F, D] or [2F, D]
  const void* w2;             // [D, F]
  const float* mean;          // [M], null but for layer
  const float* rstd;          // [M], null for none
  const void* preactivation;  // [M, F] or [M, 2F]
  const void* s;              // [M, D] post-norm only
  // Each null when its gradient is not wanted; work that only it needs is then skipped.
  void* dx;            // [M, D]
  void* dnorm_weight;  // [D]
  void* dnorm_bias;    // [D]
  void* dw1;           // like w1
  void* db1;           // [F] or [2F]
  void* dw2;           // [D, F]
  void* db2;           // [D]
  void* workspace;
  Dropout dropout, hidden_dropout;
  // Each null, or where the gradient is added instead of being stored; dw1, dw2 are null then.
  float* w1_sum;  // like w1
  float* w2_sum;  // [D, F]
  // As in FfnParams; dw1 and dw2 lie as w1 and w2 do.
  bool w1_transposed = false, w2_transposed = false;
};

constexpr bool is_pre(Placement placement, Norm norm) {
  return placement == Placement::pre && norm != Norm::none;
}
constexpr bool is_post(Placement placement, Norm norm) {
  return placement == Placement::post && norm != Norm::none;
}

// `threads` and `parallel.threads` must agree, and the instruction set must not change in between.
namespace cpu {
size_t packed_elements(const PackWeightParams& params);  // that `panels` has
size_t norm_backward_workspace(const NormBackwardParams& params, int threads);
size_t bias_activation_backward_workspace(const BiasActivationBackwardParams& params, int threads);
size_t ffn_forward_workspace(const FfnParams& params, int threads);
size_t ffn_backward_workspace(const FfnBackwardParams& params, int threads);
void norm_forward(const NormParams& params, const Parallel& parallel);
void norm_backward(const NormBackwardParams& params, const Parallel& parallel);
void bias_activation(const BiasActivationParams& params, const Parallel& parallel);
void bias_activation_backward(const BiasActivationBackwardParams& params, const Parallel& parallel);
void dropout_add(const DropoutAddParams& params, const Parallel& parallel);
void ffn_forward(const FfnParams& params, const Parallel& parallel);
void ffn_backward(const FfnBackwardParams& params, const Parallel& parallel);
void pack_weight(const PackWeightParams& params, const Parallel& parallel);
}  // namespace cpu

// Launchers return a cudaError_t as an int, 0 for success, so that this header needs no CUDA.
namespace cuda {
size_t norm_backward_workspace(const NormBackwardParams& params);
size_t bias_activation_backward_workspace(const BiasActivationBackwardParams& params);
int norm_forward(const NormParams& params, void* stream);
int norm_backward(const NormBackwardParams& params, void* stream);
int dropout_add(const DropoutAddParams& params, void* stream);
int bias_activation(const BiasActivationParams& params, void* stream);
int bias_activation_backward(const BiasActivationBackwardParams& params, void* stream);
}  // namespace cuda

}  // namespace bigkern::layernorm_ffn
