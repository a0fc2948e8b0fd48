// The adam op's C++ contract: raw pointers and sizes. No torch.
//
//   g    = g / grad_scale
//   g    = g min(1, max_norm / (grad_norm / grad_scale + 1e-6))   where grad_norm is given
//   g    = -g                                         with maximize
//   p    = p (1 - lr weight_decay)                    decoupled (AdamW); otherwise
//   g    = g + weight_decay p
//   m    = m + (1 - beta1) (g - m)
//   v    = beta2 v + (1 - beta2) g^2
//   vmax = max(vmax, v), which takes v's place below  with amsgrad
//   p    = p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)         t = step + 1
//
// Everything is updated in place: p and its master, m, v, vmax; step, which becomes t; and g, which
// becomes 0 with zero_grads, and otherwise g / grad_scale where there is a grad_scale. The math is
// fp32, rounded to the storage's dtype once. Where *found_inf is not 0 nothing changes. op.cpp has
// checked that a parameter's tensors agree.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dropout.h"
#include "common/dtypes.h"
#include "common/parallel.h"

namespace bigkern::adam {

// How m, v and vmax are stored. codes: 8 bits, see dynamic8.h, and no vmax.
enum class Moments : int { f32, bf16, f16, codes };

// Where p lives between steps, if not in p itself: fp32, or, for bf16, the 16 bits that rounding
// took from it (remainder.h).
enum class Master : int { none, f32, remainder };

// One parameter: n elements in each array, all in the same order; p and g of the call's dtype.
struct Parameter {
  void *p, *g, *m, *v;
  void* vmax;                // null without amsgrad
  void* master;              // null without
  float *m_scale, *v_scale;  // a number for each 256 elements; null but for codes
  float* step;               // one number, how many updates there were
  int64_t n;
  int64_t before;  // elements of the parameters ahead of it in the list
};

struct Update {
  Dtype dtype;
  Moments moments;
  Master master;
  double lr, beta1, beta2, eps, weight_decay, max_norm;
  bool decoupled, amsgrad, maximize, zero_grads;
  bool stochastic;  // round to bf16 at random, by seed: v, vmax, and a p without master
  uint64_t seed;
  const float* grad_scale;  // one number each, where the parameters are; null where not given
  const float* found_inf;
  const float* lr_tensor;  // replaces lr
  const float* grad_norm;  // of all gradients as they are stored; clips them to max_norm
};

// The random bits of element i of a parameter in step t are the high half of common/dropout.h's:
// head kSquares for v and vmax, kParameter for p. m is rounded to nearest: each step moves it by
// 1 - beta1 of its way, far more than bf16's last place, while v at beta2 = 0.999 would never
// shrink.
constexpr uint32_t kSquares = 0, kParameter = 1;

BIGKERN_HD DropoutRow random_row(uint64_t seed, uint32_t head, uint32_t t, int64_t position) {
  const Dropout generator = {uint32_t(seed), uint32_t(seed >> 32), 0, 1.0f};
  return generator.head(head).row(t ^ uint32_t(position >> 32) << 24);
}

// The numbers of an update that no step changes, in the kernels' precision. The differences from 1
// are taken in double: 1 - 0.999f has lost 5e-5 of its value.
struct Constants {
  float lr, sign, decay_rate, l2;  // decay_rate is weight_decay where it is decoupled, l2 where not
  float one_minus_beta1, beta2, one_minus_beta2;
  float log_beta1, log_beta2;
  float eps;
};

inline Constants constants_of(const Update& update) {
  Constants c;
  c.lr = float(update.lr);
  c.sign = update.maximize ? -1.0f : 1.0f;
  c.decay_rate = update.decoupled ? float(update.weight_decay) : 0.0f;
  c.l2 = update.decoupled ? 0.0f : float(update.weight_decay);
  c.one_minus_beta1 = float(1.0 - update.beta1);
  c.beta2 = float(update.beta2);
  c.one_minus_beta2 = float(1.0 - update.beta2);
  c.log_beta1 = float(std::log(update.beta1));
  c.log_beta2 = float(std::log(update.beta2));
  c.eps = float(update.eps);
  return c;
}

// What one step of one parameter multiplies by.
struct Factors {
  float decay;          // 1 - lr weight_decay
  float step_size;      // lr / (1 - beta1^t)
  float inv_sqrt_bias;  // 1 / sqrt(1 - beta2^t)
};

// 1 - beta^t = -expm1(t ln beta) keeps full precision in fp32 for beta near 1, without double on a
// GPU.
BIGKERN_HD Factors factors_of(const Constants& c, float lr, float t) {
  const float bias1 = -expm1f(t * c.log_beta1);
  const float bias2 = -expm1f(t * c.log_beta2);
  return {1.0f - lr * c.decay_rate, lr / bias1, 1.0f / sqrtf(bias2)};
}

// What clipping multiplies g by; norm is that of the gradients divided by grad_scale. A NaN stays
// one.
BIGKERN_HD float clip_of(float norm, float max_norm) {
  const float share = max_norm / (norm + 1e-6f);
  return share > 1.0f ? 1.0f : share;
}

namespace cpu {
void update(const Update& call, const Parameter* parameters, int64_t count,
            const Parallel& parallel);
// The Euclidean norm of all gradients; the same bits whatever the number of threads.
float grad_norm(Dtype dtype, const Parameter* parameters, int64_t count, const Parallel& parallel);
}  // namespace cpu

// The launcher returns a cudaError_t as an int, 0 for success, so that this header needs no CUDA.
namespace cuda {
int update(const Update& call, const Parameter* parameters, int64_t count, void* stream);
// workspace: one float a chunk of grad_norm_workspace; norm: one float.
int64_t grad_norm_workspace(const Parameter* parameters, int64_t count);
int grad_norm(Dtype dtype, const Parameter* parameters, int64_t count, float* workspace,
              float* norm, void* stream);
}  // namespace cuda

}  // namespace bigkern::adam
