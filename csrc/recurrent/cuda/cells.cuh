// The cells: what one step does to one hidden unit of one row, forward and backward. recurrent.h
// has the formulas; here they are, on scalars in fp32.
//
// forward() takes the gates' input side and `s`, the state's side W h', and leaves the gates
// activated; it returns h before zoneout, and in `reserve` what the backward cannot have from the
// gates. backward() takes dh, of h before zoneout, and returns the part of dh' that does not come
// through W. `dgates` is of the gates before activation; `ds` of W h', which differs in GRU's n
// alone.
#pragma once

#include "common/cuda/cuda.cuh"
#include "recurrent/recurrent.h"

namespace bigkern::recurrent::cuda {

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The derivatives of sigmoid and tanh, by their results.
__device__ __forceinline__ float dsigmoid(float y) { return y * (1.0f - y); }
__device__ __forceinline__ float dtanh(float y) { return 1.0f - y * y; }

// What is known of the step before.
struct Before {
  float h, c;  // c of the LSTM alone
};

struct Lstm {  // gates i f g o
  static constexpr int kGates = 4;

  static __device__ __forceinline__ float forward(Mode, float (&gates)[4], const float (&s)[4],
                                                  float, const Before& before, float& c) {
    gates[0] = sigmoid(gates[0] + s[0]);
    gates[1] = sigmoid(gates[1] + s[1]);
    gates[2] = tanhf(gates[2] + s[2]);
    gates[3] = sigmoid(gates[3] + s[3]);
    c = gates[1] * before.c + gates[0] * gates[2];
    return gates[3] * tanhf(c);
  }

  static __device__ __forceinline__ float backward(Mode, const float (&gates)[4], float c,
                                                   const Before& before, float dh, float& dc,
                                                   float (&dgates)[4], float (&ds)[4]) {
    const float i = gates[0], f = gates[1], g = gates[2], o = gates[3], tanh_c = tanhf(c);
    dc += dh * o * dtanh(tanh_c);
    ds[0] = dgates[0] = dc * g * dsigmoid(i);
    ds[1] = dgates[1] = dc * before.c * dsigmoid(f);
    ds[2] = dgates[2] = dc * i * dtanh(g);
    ds[3] = dgates[3] = dh * tanh_c * dsigmoid(o);
    dc *= f;
    return 0.0f;
  }
};

struct Gru {  // gates r z n
  static constexpr int kGates = 3;

  static __device__ __forceinline__ float forward(Mode, float (&gates)[3], const float (&s)[3],
                                                  float bias_n, const Before& before,
                                                  float& hidden_n) {
    hidden_n = s[2] + bias_n;
    const float r = gates[0] = sigmoid(gates[0] + s[0]);
    const float z = gates[1] = sigmoid(gates[1] + s[1]);
    const float n = gates[2] = tanhf(gates[2] + r * hidden_n);
    return (1.0f - z) * n + z * before.h;
  }

  static __device__ __forceinline__ float backward(Mode, const float (&gates)[3], float hidden_n,
                                                   const Before& before, float dh, float&,
                                                   float (&dgates)[3], float (&ds)[3]) {
    const float r = gates[0], z = gates[1], n = gates[2];
    dgates[2] = dh * (1.0f - z) * dtanh(n);
    ds[2] = dgates[2] * r;
    ds[0] = dgates[0] = dgates[2] * hidden_n * dsigmoid(r);
    ds[1] = dgates[1] = dh * (before.h - n) * dsigmoid(z);
    return dh * z;
  }
};

struct Rnn {  // the gate is h before zoneout
  static constexpr int kGates = 1;

  static __device__ __forceinline__ float forward(Mode mode, float (&gates)[1], const float (&s)[1],
                                                  float, const Before&, float&) {
    const float x = gates[0] + s[0];
    // Not fmaxf, which would turn NaN into 0.
    return gates[0] = mode == Mode::rnn_tanh ? tanhf(x) : x < 0.0f ? 0.0f : x;
  }

  static __device__ __forceinline__ float backward(Mode mode, const float (&gates)[1], float,
                                                   const Before&, float dh, float&,
                                                   float (&dgates)[1], float (&ds)[1]) {
    const float slope = mode == Mode::rnn_tanh ? dtanh(gates[0]) : gates[0] > 0.0f ? 1.0f : 0.0f;
    ds[0] = dgates[0] = dh * slope;
    return 0.0f;
  }
};

}  // namespace bigkern::recurrent::cuda
