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
#include "recurrent/cuda/cells.cuh"
#include "recurrent/cuda/kernels.h"
#include "recurrent/cuda/plan.cuh"
#include "recurrent/cuda/share.cuh"

namespace bigkern::recurrent::cuda {
namespace {

enum Kept { kDh, kDc };

// A value of a step. What can be read before the other blocks are done is as it was read: to
// convert it would be to wait for it. Of a row that has no step now, dh and dc alone.
template <class Cell, class T>
struct Item {
  static constexpr int G = Cell::kGates;
  T gates[G], dy, zoneout, h_before, c0;
  float reserve, c_before, dh, dc;
  float dgates[G], ds[G];

  __device__ __forceinline__ void load(const ScanBackward& call, const Share<T>& share,
                                       const Value& v, const Walk& walk) {
    const int64_t row = walk.first + v.row, at = share.at(row, v.unit);
    const T zero = from_float<T>(0.0f);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      gates[g] = static_cast<const T*>(call.gates)[share.at(row, v.unit, G, g)];
    }
    dy = call.dy ? static_cast<const T*>(call.dy)[at] : zero;
    zoneout = call.zoneout ? static_cast<const T*>(call.zoneout)[at] : zero;
    reserve = G > 1 ? call.reserve[at] : 0.0f;

    const bool first = v.row >= walk.next_rows;  // of the scan, for this row
    const int64_t before = first ? (share.d * share.B + v.row) * share.H + v.unit
                                 : share.at(walk.next_first() + v.row, v.unit);
    h_before = G == 3 ? static_cast<const T*>(first ? call.h0 : call.y)[before] : zero;
    c0 = G == 4 && first ? static_cast<const T*>(call.c0)[before] : zero;
    c_before = G == 4 && !first ? call.reserve[before] : 0.0f;
  }

  // The cell's backward; dh has the product's part already.
  __device__ __forceinline__ void step(const ScanBackward& call) {
    float activated[G];
#pragma unroll
    for (int g = 0; g < G; ++g) activated[g] = to_float(gates[g]);
    const Before before = {to_float(h_before), c_before + to_float(c0)};
    dh += to_float(dy);
    const float kept = to_float(zoneout) * dh;
    dh = kept + Cell::backward(call.of.mode, activated, reserve, before, dh - kept, dc, dgates, ds);
  }

  __device__ __forceinline__ void store(const ScanBackward& call, const Share<T>& share,
                                        const Value& v, int64_t row) const {
#pragma unroll
    for (int g = 0; g < G; ++g) {
      static_cast<T*>(call.dgates)[share.at(row, v.unit, G, g)] = from_float<T>(dgates[g]);
    }
    if (G == 3) {
      static_cast<T*>(call.dhidden_n)[share.at(row, v.unit)] = from_float<T>(ds[G - 1]);
    }
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
  const int tile_weights = G * plan.chunks * kFragment<T>, gate = plan.chunks * kDepth<T>;
  float* const parts = reinterpret_cast<float*>(weights + plan.unit_tiles * tile_weights);
  load_weights<G, true>(weights, call.w_hh[share.d], int(call.of.H), share.unit0, plan.unit_tiles,
                        plan.chunks);
  begin(call, share);

  Walk walk(call.of, share.d == 1);
  int product_end = share.row0;  // of the rows that had a step before
  for (int step = 0; step <= int(call.of.T); ++step, walk.advance()) {
    const int step_end = min(share.row_end, walk.rows);
    share.each_pass(plan.tiles, max(step_end, product_end), [&](const Pass& pass) {
      const Value v(pass);
      const bool exists = v.row < pass.end && v.unit < share.H, steps = exists && v.row < step_end;
      Item<Cell, T> item = {};
      if (exists)
        item.dh = share.kept(kDh, v.row, v.unit), item.dc = share.kept(kDc, v.row, v.unit);
      if (steps) item.load(call, share, v, walk);
      if (pass.first) grid_wait(share.counter, share.blocks * step);
      const int tiles = tiles_of(min(pass.end, product_end) - pass.row);
      multiply<1>(parts, tiles, share.tile(step + 1, pass.row), share.pitch,
                  weights + pass.unit_tile * tile_weights, G * plan.chunks);
      __syncthreads();  // all parts are here
      if (exists && v.row < product_end) item.dh += v.sum<1>(parts, tiles, 0);
      if (steps) {
        item.step(call);
#pragma unroll
        for (int g = 0; g < G; ++g) {
          share.exchanged(step, v.row, g * gate + v.unit) = from_float<T>(item.ds[g]);
        }
      }
      share.passed(pass);
      if (exists)
        share.kept(kDh, v.row, v.unit) = item.dh, share.kept(kDc, v.row, v.unit) = item.dc;
      if (steps) item.store(call, share, v, walk.first + v.row);  // no other block waits for this
    });
    product_end = step_end;
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
