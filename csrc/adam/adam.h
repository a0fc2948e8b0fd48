// The adam op's C++ contract: raw pointers and sizes. No torch.
//
//   g    = sign g / grad_scale                        sign is -1 with maximize
//   p    = p (1 - lr weight_decay)                    decoupled (AdamW); otherwise
//   g    = g + weight_decay p
//   m    = m + (1 - beta1) (g - m)
//   v    = beta2 v + (1 - beta2) g^2
//   vmax = max(vmax, v), which takes v's place below  with amsgrad
//   p    = p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)         t = step + 1
//
// Everything is updated in place: p, m, v, vmax; step, which becomes t; and, where there is a
// grad_scale, g, which becomes g / grad_scale. The math is fp32, rounded to the storage's dtype
// once. Where *found_inf is not 0 nothing changes. op.cpp has checked that a parameter's tensors
// agree.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtypes.h"
#include "common/parallel.h"

namespace bigkern::adam {

// One parameter: n elements of the call's dtype in each array, all in the same order.
struct Parameter {
  void *p, *g, *m, *v;
  void* vmax;   // null without amsgrad
  float* step;  // one number, how many updates there were
  int64_t n;
  int64_t before;  // elements of the parameters ahead of it in the list
};

struct Update {
  Dtype dtype;
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled, amsgrad, maximize;
  const float* grad_scale;  // one number each, where the parameters are; null where not given
  const float* found_inf;
  const float* lr_tensor;  // replaces lr
};

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

namespace cpu {
void update(const Update& call, const Parameter* parameters, int64_t count,
            const Parallel& parallel);
}  // namespace cpu

// The launcher returns a cudaError_t as an int, 0 for success, so that this header needs no CUDA.
namespace cuda {
int update(const Update& call, const Parameter* parameters, int64_t count, void* stream);
}  // namespace cuda

}  // namespace bigkern::adam
