// The scan of a recurrent layer: one launch for all steps and both directions.
//
//   s = h' W_hh^T      gates = act(x W_ih^T + s)      h, c = cell(gates, h', c')
//
// Weights that stay on chip over all steps (Diamos et al., Persistent RNNs, 2016), on tensor cores
// with the cell in the product's epilogue (Poeppel et al., FlashRNN, 2024). Of each hidden unit one
// block computes all gates, so that nothing but h goes from block to block: written, h rounded to
// the operands' type, by one step and read by the next, with one barrier between them.
//
//   exchange half s % 2       h' [B, H] --> mma --> parts --> cell --> y, hn
//   exchange half (s+1) % 2                                     `----> h
//   state fp32                h', c'    ----------------------^  `---> h, c
//
// Both halves begin with h0, so that a row that joins late, in the reverse direction, finds it.
#include "recurrent/cells.cuh"
#include "recurrent/kernels.h"
#include "recurrent/plan.cuh"
#include "recurrent/share.cuh"

namespace bigkern::recurrent::cuda {
namespace {

enum Kept { kH, kC };

// A value of a step, and what of it can be read before the other blocks are done.
template <class Cell, class T>
struct Item {
  static constexpr int G = Cell::kGates;
  Before before;
  float gates[G], bias_n, zoneout;

  __device__ __forceinline__ void load(const Scan& call, const Share<T>& share, const Value& v,
                                       int64_t row) {
    const T* const x = static_cast<const T*>(call.gates);
#pragma unroll
    for (int g = 0; g < G; ++g) gates[g] = to_float(x[share.at(row, v.unit, G, g)]);
    before = {share.kept(kH, v.row, v.unit), share.kept(kC, v.row, v.unit)};
    bias_n = zoneout = 0.0f;
    if (call.bias_n != nullptr) {
      bias_n = to_float(static_cast<const T*>(call.bias_n)[share.at(0, v.unit)]);
    }
    if (call.zoneout != nullptr) {
      zoneout = to_float(static_cast<const T*>(call.zoneout)[share.at(row, v.unit)]);
    }
  }

  // The cell, given the sums `s`; h to the exchange.
  __device__ __forceinline__ void store(const Scan& call, const Share<T>& share, const Value& v,
                                        int64_t row, const float (&s)[G], T* exchange) {
    float reserve = 0.0f;
    float h = Cell::forward(call.of.mode, gates, s, bias_n, before, reserve);
    h += zoneout * (before.h - h);
    const T rounded = from_float<T>(h);
    exchange[v.unit] = rounded;
    static_cast<T*>(call.y)[share.at(row, v.unit)] = rounded;
    share.kept(kH, v.row, v.unit) = h;
    if (G == 4) share.kept(kC, v.row, v.unit) = reserve;
    if (!call.save) return;
    if (G > 1) call.reserve[share.at(row, v.unit)] = reserve;
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
    share.rows(0, row)[unit] = share.rows(1, row)[unit] = h0;
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
    const int rows_end = min(share.row_end, walk.rows);
    for (int row0 = share.row0; row0 == share.row0 || row0 < rows_end; row0 += plan.tiles * 16) {
      for (int u = 0; u < plan.unit_tiles; ++u) {
        const Pass pass = {row0, min(rows_end, row0 + plan.tiles * kTileRows),
                           share.unit0 + u * kTileUnits};
        const auto each = [&](auto f) {
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
            const Value v(pass, i);
            if (v.row < pass.end && v.unit < share.H) f(i, v);
          }
        };
        Item<Cell, T> items[kItems];
        each([&](int i, const Value& v) { items[i].load(call, share, v, walk.first + v.row); });
        if (row0 == share.row0 && u == 0) grid_wait(share.counter, share.blocks * (step + 1));
        multiply<G>(parts, pass.tiles(), share.rows(step, row0), share.pitch,
                    weights + u * tile_weights, plan.chunks);
        __syncthreads();  // all parts are here
        each([&](int i, const Value& v) {
          float s[G];
#pragma unroll
          for (int g = 0; g < G; ++g) s[g] = v.sum<G>(parts, pass.tiles(), g);
          items[i].store(call, share, v, walk.first + v.row, s, share.rows(step + 1, v.row));
        });
        __syncthreads();  // and may be overwritten
      }
    }
    grid_arrive(share.counter);
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

size_t scan_workspace(const Scan& call) { return workspace_bytes(call.of, 1); }

int scan(const Scan& call, void* stream) { return launch_persistent(kTable, call, 1, stream); }

int scan_kernels(KernelInfo* out, int capacity) { return list(kTable, out, capacity); }

}  // namespace bigkern::recurrent::cuda
