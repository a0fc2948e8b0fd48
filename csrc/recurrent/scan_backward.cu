// The backward of the scan: one launch for all steps and both directions, as scan.cu.
//
//   dh += dy      dgates, direct, dc' = cell'(gates, dh, dc, h', c')      dh' = direct + ds W_hh
//
// ds is the gradient of W_hh h': dgates, but for GRU's n. A block owns the hidden units that it
// owns in the forward, and so W_hh's columns where that has its rows: the product sums over all
// gates of all hidden units. Its operand, ds of the step before in this walk, goes through the
// exchange; the walk is one step longer than the scan, because dh0 still needs the product.
//
//   exchange half (s+1) % 2   ds [B, G, H] --> mma --> parts --> cell' --> dgates, dhidden_n
//   exchange half s % 2                                           `----> ds
//   state fp32                direct, dc   -----------------------^ `--> direct, dc
//
// Rows begin where the scan ended, with dhn and dcn, and end where it began, with dh0 and dc0.
#include "recurrent/cells.cuh"
#include "recurrent/kernels.h"
#include "recurrent/plan.cuh"
#include "recurrent/share.cuh"

namespace bigkern::recurrent::cuda {
namespace {

enum Kept { kDh, kDc };

// A value of a step, and what of it can be read before the other blocks are done. Of a row that has
// no step now, dh and dc alone.
template <class Cell, class T>
struct Item {
  static constexpr int G = Cell::kGates;
  Before before;
  float gates[G], reserve, zoneout, dh, dc;

  __device__ __forceinline__ void load_gradients(const Share<T>& share, const Value& v) {
    dh = share.kept(kDh, v.row, v.unit);
    dc = G == 4 ? share.kept(kDc, v.row, v.unit) : 0.0f;
  }

  __device__ __forceinline__ void load_step(const ScanBackward& call, const Share<T>& share,
                                            const Value& v, const Walk& walk) {
    const int64_t row = walk.first + v.row, at = share.at(row, v.unit);
    const T* const activated = static_cast<const T*>(call.gates);
#pragma unroll
    for (int g = 0; g < G; ++g) gates[g] = to_float(activated[share.at(row, v.unit, G, g)]);
    reserve = G > 1 ? call.reserve[at] : 0.0f;
    zoneout = call.zoneout != nullptr ? to_float(static_cast<const T*>(call.zoneout)[at]) : 0.0f;
    if (call.dy != nullptr) dh += to_float(static_cast<const T*>(call.dy)[at]);

    before = {0.0f, 0.0f};
    const bool first = v.row >= walk.next_rows;  // of the scan, for this row
    const int64_t from = first ? (share.d * share.B + v.row) * share.H + v.unit
                               : share.at(walk.next_first() + v.row, v.unit);
    if (G == 3) before.h = to_float(static_cast<const T*>(first ? call.h0 : call.y)[from]);
    if (G == 4) {
      before.c = first ? to_float(static_cast<const T*>(call.c0)[from]) : call.reserve[from];
    }
  }

  // The cell's backward, dh being complete; ds to the exchange.
  __device__ __forceinline__ void store_step(const ScanBackward& call, const Share<T>& share,
                                             const Value& v, const Walk& walk, T* exchange) {
    const int64_t row = walk.first + v.row;
    float dgates[G], ds[G];
    const float kept = zoneout * dh;
    dh = kept + Cell::backward(call.of.mode, gates, reserve, before, dh - kept, dc, dgates, ds);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      exchange[g * (share.pitch / G) + v.unit] = from_float<T>(ds[g]);
      static_cast<T*>(call.dgates)[share.at(row, v.unit, G, g)] = from_float<T>(dgates[g]);
    }
    if (G == 3) {
      static_cast<T*>(call.dhidden_n)[share.at(row, v.unit)] = from_float<T>(ds[G - 1]);
    }
  }

  __device__ __forceinline__ void store_gradients(const Share<T>& share, const Value& v) const {
    share.kept(kDh, v.row, v.unit) = dh;
    if (G == 4) share.kept(kDc, v.row, v.unit) = dc;
  }
};

template <class T>
__device__ __forceinline__ void begin(const ScanBackward& call, const Share<T>& share) {
  const auto value = [](const void* x, int64_t at) {
    return x == nullptr ? 0.0f : to_float(static_cast<const T*>(x)[at]);
  };
  share.each([&](int row, int unit, int64_t at) {
    share.kept(kDh, row, unit) = value(call.dhn, at);
    share.kept(kDc, row, unit) = value(call.dcn, at);
  });
  __syncthreads();
}

template <class T>
__device__ __forceinline__ void end(const ScanBackward& call, const Share<T>& share) {
  share.each([&](int row, int unit, int64_t at) {
    static_cast<T*>(call.dh0)[at] = from_float<T>(share.kept(kDh, row, unit));
    if (call.dc0 != nullptr) {
      static_cast<T*>(call.dc0)[at] = from_float<T>(share.kept(kDc, row, unit));
    }
  });
}

template <class Cell, class T>
__global__ void __launch_bounds__(kThreads, 1)
    scan_backward_kernel(const __grid_constant__ Work<ScanBackward> work) {
  constexpr int G = Cell::kGates;
  const ScanBackward& call = work.call;
  const Plan& plan = work.plan;
  const Share<T> share(plan, call.of, G);
  T* const weights = dynamic_smem<T>();
  const int tile_weights = G * plan.chunks * kFragment<T>;
  float* const parts = reinterpret_cast<float*>(weights + plan.unit_tiles * tile_weights);
  load_weights<G, true>(weights, call.w_hh[share.d], int(call.of.H), share.unit0, plan.unit_tiles,
                        plan.chunks);
  begin(call, share);

  Walk walk(call.of, share.d == 1);
  int product_end = share.row0;  // of the rows that had a step before
  for (int step = 0; step <= int(call.of.T); ++step, walk.advance()) {
    const int step_end = min(share.row_end, walk.rows), rows_end = max(step_end, product_end);
    for (int row0 = share.row0; row0 == share.row0 || row0 < rows_end; row0 += plan.tiles * 16) {
      const int pass_end = min(rows_end, row0 + plan.tiles * kTileRows);
      for (int u = 0; u < plan.unit_tiles; ++u) {
        const int unit0 = share.unit0 + u * kTileUnits;
        const auto each = [&](auto f) {
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
            const Value v({row0, pass_end, unit0}, i);
            if (v.row < pass_end && v.unit < share.H) f(i, v);
          }
        };
        Item<Cell, T> items[kItems];
        each([&](int i, const Value& v) {
          items[i].load_gradients(share, v);
          if (v.row < step_end) items[i].load_step(call, share, v, walk);
        });
        if (row0 == share.row0 && u == 0) grid_wait(share.counter, share.blocks * step);
        const Pass product = {row0, min(pass_end, product_end), unit0};
        multiply<1>(parts, product.tiles(), share.rows(step + 1, row0), share.pitch,
                    weights + u * tile_weights, G * plan.chunks);
        __syncthreads();  // all parts are here
        each([&](int i, const Value& v) {
          if (v.row < product.end) items[i].dh += v.sum<1>(parts, product.tiles(), 0);
          if (v.row < step_end) items[i].store_step(call, share, v, walk, share.rows(step, v.row));
          items[i].store_gradients(share, v);
        });
        __syncthreads();  // and may be overwritten
      }
    }
    product_end = step_end;
    grid_arrive(share.counter);
  }
  __syncthreads();
  end(call, share);
}

const Kernel<ScanBackward> kTable[] = {
    {"recurrent scan_backward lstm bf16", Dtype::bf16, 4, scan_backward_kernel<Lstm, bf16>},
    {"recurrent scan_backward lstm fp16", Dtype::f16, 4, scan_backward_kernel<Lstm, fp16>},
    {"recurrent scan_backward lstm fp32", Dtype::f32, 4, scan_backward_kernel<Lstm, float>},
    {"recurrent scan_backward gru bf16", Dtype::bf16, 3, scan_backward_kernel<Gru, bf16>},
    {"recurrent scan_backward gru fp16", Dtype::f16, 3, scan_backward_kernel<Gru, fp16>},
    {"recurrent scan_backward gru fp32", Dtype::f32, 3, scan_backward_kernel<Gru, float>},
    {"recurrent scan_backward rnn bf16", Dtype::bf16, 1, scan_backward_kernel<Rnn, bf16>},
    {"recurrent scan_backward rnn fp16", Dtype::f16, 1, scan_backward_kernel<Rnn, fp16>},
    {"recurrent scan_backward rnn fp32", Dtype::f32, 1, scan_backward_kernel<Rnn, float>},
};

}  // namespace

size_t scan_backward_workspace(const ScanBackward& call) {
  return workspace_bytes(call.of, call.of.G());
}

int scan_backward(const ScanBackward& call, void* stream) {
  return launch_persistent(kTable, call, call.of.G(), stream);
}

int scan_backward_kernels(KernelInfo* out, int capacity) { return list(kTable, out, capacity); }

int kernels(KernelInfo* out, int capacity) {
  const int count = scan_kernels(out, capacity);
  return count + scan_backward_kernels(out + count, capacity - count);
}

}  // namespace bigkern::recurrent::cuda
