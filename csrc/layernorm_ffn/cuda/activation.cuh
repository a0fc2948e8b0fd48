// The activations and their derivatives, on floats.
#pragma once

#include "common/cuda/cuda.cuh"
#include "common/cuda/ptx.cuh"
#include "layernorm_ffn/layernorm_ffn.h"

namespace bigkern::layernorm_ffn::cuda {

// An activation's value and derivative at u.
struct Value {
  float act, slope;
};

// 1 / (1 + e^-u). Also (1 + tanh(u / 2)) / 2, without that form's cancellation where u < 0.
__device__ __forceinline__ float sigmoid(float u) { return ptx::rcp_approx(1.0f + expf(-u)); }

struct Relu {
  static constexpr bool kGated = false;
  static __device__ __forceinline__ float act(float u) {
    return u <= 0.0f ? 0.0f : u;
  }  // keeps NaN
  static __device__ __forceinline__ Value both(float u) {
    return {act(u), u <= 0.0f ? 0.0f : 1.0f};
  }
};

// u Phi(u), Phi the normal distribution's cumulative function, phi its density: slope Phi + u phi.
struct Gelu {
  static constexpr bool kGated = false;
  static __device__ __forceinline__ float cdf(float u) {
    return 0.5f * (1.0f + erff(u * 0.707106781f));
  }
  static __device__ __forceinline__ float act(float u) { return u * cdf(u); }
  static __device__ __forceinline__ Value both(float u) {
    const float Phi = cdf(u);
    const float phi = 0.398942280f * expf(-0.5f * u * u);
    return {u * Phi, Phi + u * phi};
  }
};

// u (1 + tanh(z)) / 2 = u sigmoid(2z), z = sqrt(2 / pi) (u + 0.044715 u^3).
struct GeluTanh {
  static constexpr bool kGated = false;
  static constexpr float kTwoC = 1.595769122f;  // 2 sqrt(2 / pi)
  static constexpr float kCubic = 0.044715f;
  static __device__ __forceinline__ float weight(float u) {
    return sigmoid(kTwoC * u * (1.0f + kCubic * u * u));
  }
  static __device__ __forceinline__ float act(float u) { return u * weight(u); }
  static __device__ __forceinline__ Value both(float u) {
    const float w = weight(u);
    const float inner = kTwoC * (1.0f + 3.0f * kCubic * u * u);
    return {u * w, w + u * w * (1.0f - w) * inner};
  }
};

struct Silu {
  static constexpr bool kGated = false;
  static __device__ __forceinline__ float act(float u) { return u * sigmoid(u); }
  static __device__ __forceinline__ Value both(float u) {
    const float w = sigmoid(u);
    return {u * w, w + u * w * (1.0f - w)};
  }
};

struct Swiglu : Silu {
  static constexpr bool kGated = true;
};

struct Geglu : Gelu {
  static constexpr bool kGated = true;
};

// Calls f with the activation's type: the one switch, outside of every loop.
template <class F>
__device__ __forceinline__ void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::relu:
      return f(Relu{});
    case Activation::gelu:
      return f(Gelu{});
    case Activation::gelu_tanh:
      return f(GeluTanh{});
    case Activation::silu:
      return f(Silu{});
    case Activation::swiglu:
      return f(Swiglu{});
    case Activation::geglu:
      return f(Geglu{});
  }
}

}  // namespace bigkern::layernorm_ffn::cuda
