// The scan of a recurrent layer over time: its contract on every backend, free of torch.
//
// The input's part of the gates has been multiplied before, as one product over all steps; the scan
// adds the state's part and walks through time. On a CPU it may also be a product over some steps
// at a time, whose results wait in the caches. With ' for the step before, * elementwise:
//
//   LSTM   i, f, o = sigmoid(x_i + W_i h'), ..   g = tanh(x_g + W_g h')
//          c = f * c' + i * g                    h = o * tanh(c)
//   GRU    r, z = sigmoid(x_r + W_r h'), ..      n = tanh(x_n + r * (W_n h' + b_n))
//          h = (1 - z) * n + z * h'
//   RNN    h = tanh(x + W h')  or  relu(x + W h')
//
//   zoneout: h becomes h + m * (h' - h), m given for every h
//
// Rows lie step after step, as in torch's PackedSequence: step t has batch_sizes[t] of them, never
// more than the step before it. Direction 0 walks t up, direction 1 down, where rows join as the
// steps grow. The state is fp32 in the scan, whatever is stored.
//
//             t = 0        t = 1      t = 2         N = 6 rows, B = 3
//   rows    +---+---+---+---+---+---+
//           | a | b | c | a | b | a |               direction 1 starts a at t = 2, b at 1, c at 0
//           +---+---+---+---+---+---+
//
// Launchers allocate nothing: the workspace queries say how many bytes they need.
#pragma once

#include <cstddef>

#include "common/dtypes.h"
#include "common/parallel.h"

namespace bigkern::recurrent {

enum class Mode { lstm, gru, rnn_tanh, rnn_relu };

constexpr int64_t gates_of(Mode mode) { return mode == Mode::lstm ? 4 : mode == Mode::gru ? 3 : 1; }

// T steps, N rows in all, D directions (1 or 2), B sequences, H hidden units, G gates.
struct Sizes {
  Dtype dtype;
  Mode mode;
  int64_t T, N, D, B, H;
  const int64_t* batch_sizes;  // [T], null: B each. On the host for cpu, on the device for cuda

  int64_t G() const { return gates_of(mode); }
};

// A scan on projected gates.
struct Scan {
  Sizes of;
  void* gates;          // [N, D, G, H]: x W_ih^T + biases; becomes the activated gates if save
  const void *h0, *c0;  // [D, B, H]; c0 of the LSTM alone
  const void* w_hh[2];  // [G, H, H] a direction
  const void* bias_n;   // [D, H], null ok: 0; of the GRU alone
  const void* zoneout;  // [N, D, H], null ok: 0
  void* y;              // [N, D, H]
  void *hn, *cn;        // [D, B, H]
  float* reserve;       // [N, D, H] if save: c of the LSTM, W_n h' + b_n of the GRU
  bool save;            // for the backward
  void* workspace;
};

// A layer on a CPU: projection and scan, or a scan alone.
struct Layer {
  Sizes of;
  int64_t I;
  const void* x;          // [N, I], or null where the gates have been projected
  const void* projected;  // [N, D, G, H]: x W_ih^T + biases, as the scan's gates; may alias gates
  const void* w_ih[2];    // [G, H, I] a direction
  const void* w_hh[2];    // [G, H, H]
  const void* b_ih[2];    // [G, H], both null ok: 0
  const void* b_hh[2];
  const void* bias_n;   // [D, H], null ok: 0; of projected gates, the GRU's alone
  const void *h0, *c0;  // [D, B, H]; c0 of the LSTM alone
  const void* zoneout;  // [N, D, H], null ok: 0
  void* y;              // [N, D, H]
  void *hn, *cn;        // [D, B, H]
  void* gates;          // [N, D, G, H], activated, null ok: no backward will come
  float* reserve;       // [N, D, H] where there are gates, as the scan's
  void* workspace;
};

// Of the gates before their activation, `dgates`; as the state's part of GRU's n enters n through
// r, `dhidden_n` is that part's. Gradients that are null count as 0.
struct ScanBackward {
  Sizes of;
  const void* dy;         // [N, D, H], null ok
  const void *dhn, *dcn;  // [D, B, H], null ok
  const void* gates;      // [N, D, G, H], activated
  const void *h0, *c0;    // [D, B, H]
  const void* w_hh[2];    // [G, H, H] a direction
  const void* zoneout;    // [N, D, H], null ok
  const void* y;          // [N, D, H]
  const float* reserve;   // [N, D, H]
  void* dgates;           // [N, D, G, H]
  void* dhidden_n;        // [N, D, H], of the GRU alone
  void *dh0, *dc0;        // [D, B, H]
  void* workspace;
};

namespace cpu {
size_t layer_workspace(const Layer& call, int threads);
size_t scan_backward_workspace(const ScanBackward& call, int threads);
void layer(const Layer& call, const Parallel& parallel);
void scan_backward(const ScanBackward& call, const Parallel& parallel);
}  // namespace cpu

#ifdef BIGKERN_CUDA
namespace cuda {
bool fits(const Sizes& of);  // whether the current device holds w_hh on chip; the scans fail if not
size_t scan_workspace(const Scan& call);
size_t scan_backward_workspace(const ScanBackward& call);
int scan(const Scan& call, void* stream);
int scan_backward(const ScanBackward& call, void* stream);
}  // namespace cuda
#endif

}  // namespace bigkern::recurrent
