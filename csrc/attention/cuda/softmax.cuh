// The online softmax of a warp's strip: what has been seen of a row is summed up in the largest
// score m, the sum l of exp(score - m), and whatever is summed with the weights p = exp(score - m),
// which a larger score in a later tile rescales.
//
// Source: Milakov and Gimelshein, Online normalizer calculation for softmax (2018).
#pragma once

#include "attention/cuda/scores.cuh"

namespace bigkern::attention::cuda {

// The running softmax of the two rows that a lane holds of a strip. A sink, -inf for none, is a
// score like any other, but for having no value: it is what the row begins with.
struct Softmax {
  float m[2], l[2];  // l of this lane's columns only

  __device__ __forceinline__ Softmax(float sink, float sink_below) : m{sink, sink_below} {
    l[0] = lane() % 4 == 0 && m[0] != -INFINITY ? 1.0f : 0.0f;
    l[1] = lane() % 4 == 0 && m[1] != -INFINITY ? 1.0f : 0.0f;
  }
};

// Turns scores into p = exp(s - m), and returns what the sums of the tiles before have to be
// multiplied with. A row that has seen nothing yet has m = -inf and p = 0.
template <class T, int N>
__device__ __forceinline__ void softmax_step(Softmax& row, float (&s)[N][4], float (&rescale)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float m = row.m[half];
#pragma unroll
    for (int n = 0; n < N; ++n) m = fmaxf(m, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    m = warp_max<4>(m);
    const float origin = m == -INFINITY ? 0.0f : m;
    rescale[half] = exp_of<T>(row.m[half] - origin);
    row.m[half] = m;

    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        s[n][e] = exp_of<T>(s[n][e] - origin);
        sum += s[n][e];
      }
    }
    row.l[half] = row.l[half] * rescale[half] + sum;
  }
}

// Multiplies the two rows that a lane holds of a strip.
template <int N>
__device__ __forceinline__ void scale_rows(float (&acc)[N][4], const float (&scale)[2]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[n][e] *= scale[e / 2];
  }
}

}  // namespace bigkern::attention::cuda
