// The scan of a recurrent layer: one launch for all steps and both directions.
//
//   s = h' W_hh^T      gates = act(x W_ih^T + s)      h, c = cell(gates, h', c')
//
// Weights that stay on chip over all steps (Diamos et al., Persistent RNNs, 2016), on tensor cores
// with the cell in the product's epilogue (Poeppel et al., FlashRNN, 2024). Of each hidden unit one
// block computes all gates, so that nothing but h goes from block to block: written, h rounded to
// the operands' type, by one step and read by the next, with one barrier between them.
//
//   exchange half s % 2       h' [B, H] --> mma --> parts --> cell --> y, gates, reserve
//   exchange half (s+1) % 2                                  ^  `----> h
//   state fp32                h', c' ------------------------'   `---> h, c
//
// Both halves begin with h0, so that a row that joins late, in the reverse direction, finds it.
#include "recurrent/cuda/cells.cuh"
#include "recurrent/cuda/kernels.h"
#include "recurrent/cuda/plan.cuh"
#include "recurrent/cuda/share.cuh"

namespace bigkern::recurrent::cuda {
namespace {

enum Kept { kH, kC };

// A value of a step. What can be read before the other blocks are done is as it was read: to
// convert it would be to wait for it.
template <class Cell, class T>
struct Item {
  static constexpr int G = Cell::kGates;
  T x[G], bias_n, zoneout;
  Before before;
  float gates[G], h, reserve;

  __device__ __forceinline__ void load(const Scan& call, const Share<T>& share, const Value& v,
                                       int64_t row) {
    const T zero = from_float<T>(0.0f);
    const int64_t at = share.at(row, v.unit);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      x[g] = static_cast<const T*>(call.gates)[share.at(row, v.unit, G, g)];
    }
    bias_n = G == 3 && call.bias_n ? static_cast<const T*>(call.bias_n)[share.at(0, v.unit)] : zero;
    zoneout = call.zoneout ? static_cast<const T*>(call.zoneout)[at] : zero;
    before = {share.kept(kH, v.row, v.unit), G == 4 ? share.kept(kC, v.row, v.unit) : 0.0f};
  }

  // The cell, given the state's side of the gates.
  __device__ __forceinline__ T step(const Scan& call, const float (&s)[G]) {
#pragma unroll
    for (int g = 0; g < G; ++g) gates[g] = to_float(x[g]);
    reserve = 0.0f;
    h = Cell::forward(call.of.mode, gates, s, to_float(bias_n), before, reserve);
    h += to_float(zoneout) * (before.h - h);
    return from_float<T>(h);
  }

  __device__ __forceinline__ void store(const Scan& call, const Share<T>& share, const Value& v,
                                        int64_t row) const {
    const int64_t at = share.at(row, v.unit);
    share.kept(kH, v.row, v.unit) = h;
    if (G == 4) share.kept(kC, v.row, v.unit) = reserve;
    static_cast<T*>(call.y)[at] = from_float<T>(h);
    if (!call.save) return;
    if (G > 1) call.reserve[at] = reserve;
#pragma unroll
    for (int g = 0; g < G; ++g) {
      static_cast<T*>(call.gates)[share.at(row, v.unit, G, g)] = from_float<T>(gates[g]);
    }
  }
};

template <class T>
__device__ __forceinline__ void begin(const Scan& call, const Share<T>& share) {
  share.each([&](int row, int unit, int64_t at) {
    const T h0 = static_cast<const T*>(call.h0)[at];
    share.exchanged(0, row, unit) = share.exchanged(1, row, unit) = h0;
    share.kept(kH, row, unit) = to_float(h0);
    if (call.c0 != nullptr) {
      share.kept(kC, row, unit) = to_float(static_cast<const T*>(call.c0)[at]);
    }
  });
}

template <class T>
__device__ __forceinline__ void end(const Scan& call, const Share<T>& share) {
  share.each([&](int row, int unit, int64_t at) {
    static_cast<T*>(call.hn)[at] = from_float<T>(share.kept(kH, row, unit));
    if (call.cn != nullptr) {
      static_cast<T*>(call.cn)[at] = from_float<T>(share.kept(kC, row, unit));
    }
  });
}

template <class Cell, class T>
__global__ void __launch_bounds__(kThreads, 1)
    scan_kernel(const __grid_constant__ Work<Scan> work) {
  constexpr int G = Cell::kGates;
  const Scan& call = work.call;
  const Plan& plan = work.plan;
  const Share<T> share(plan, call.of, 1);
  T* const weights = dynamic_smem<T>();
  const int tile_weights = G * plan.chunks * kFragment<T>;
  float* const parts = reinterpret_cast<float*>(weights + plan.unit_tiles * tile_weights);
  load_weights<G, false>(weights, call.w_hh[share.d], int(call.of.H), share.unit0, plan.unit_tiles,
                         plan.chunks);
  begin(call, share);
  grid_arrive(share.counter);

  Walk walk(call.of, share.d == 0);
  for (int step = 0; step < int(call.of.T); ++step, walk.advance()) {
    share.each_pass(plan.tiles, min(share.row_end, walk.rows), [&](const Pass& pass) {
      const Value v(pass);
      const bool exists = v.row < pass.end && v.unit < share.H;
      Item<Cell, T> item = {};
      if (exists) item.load(call, share, v, walk.first + v.row);
      if (pass.first) grid_wait(share.counter, share.blocks * (step + 1));
      const int tiles = tiles_of(pass.end - pass.row);
      multiply<G>(parts, tiles, share.tile(step, pass.row), share.pitch,
                  weights + pass.unit_tile * tile_weights, plan.chunks);
      __syncthreads();  // all parts are here
      if (exists) {
        float s[G];
#pragma unroll
        for (int g = 0; g < G; ++g) s[g] = v.sum<G>(parts, tiles, g);
        share.exchanged(step + 1, v.row, v.unit) = item.step(call, s);
      }
      share.passed(pass);
      if (exists) item.store(call, share, v, walk.first + v.row);  // no other block waits for this
    });
  }
  __syncthreads();
  end(call, share);
}

const Kernel<Scan> kTable[] = {
    {"recurrent scan lstm bf16", Dtype::bf16, 4, scan_kernel<Lstm, bf16>},
    {"recurrent scan lstm fp16", Dtype::f16, 4, scan_kernel<Lstm, fp16>},
    {"recurrent scan lstm fp32", Dtype::f32, 4, scan_kernel<Lstm, float>},
    {"recurrent scan gru bf16", Dtype::bf16, 3, scan_kernel<Gru, bf16>},
    {"recurrent scan gru fp16", Dtype::f16, 3, scan_kernel<Gru, fp16>},
    {"recurrent scan gru fp32", Dtype::f32, 3, scan_kernel<Gru, float>},
    {"recurrent scan rnn bf16", Dtype::bf16, 1, scan_kernel<Rnn, bf16>},
    {"recurrent scan rnn fp16", Dtype::f16, 1, scan_kernel<Rnn, fp16>},
    {"recurrent scan rnn fp32", Dtype::f32, 1, scan_kernel<Rnn, float>},
};

}  // namespace

bool fits(const Sizes& of) {
  Plan plan;
  return make_plan(plan, of, 1) == cudaSuccess && make_plan(plan, of, of.G()) == cudaSuccess;
}

size_t scan_workspace(const Scan& call) { return workspace_bytes(call.of, 1); }

int scan(const Scan& call, void* stream) { return launch_persistent(kTable, call, 1, stream); }

int scan_kernels(KernelInfo* out, int capacity) { return list(kTable, out, capacity); }

}  // namespace bigkern::recurrent::cuda
