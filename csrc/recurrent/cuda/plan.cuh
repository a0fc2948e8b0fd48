// For the host: how a call is shared out, its workspace, and the tables of kernels.
//
// A row of the exchange has `columns` times H values: one for h, G for the gradients of the gates.
// The product has G / columns tiles of eight columns for each tile of hidden units.
#pragma once

#include <algorithm>

#include "common/cuda/launch.cuh"
#include "recurrent/cuda/share.cuh"

namespace bigkern::recurrent::cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }
constexpr int64_t depth_of(Dtype dtype) {
  return dtype == Dtype::f32 ? kDepth<float> : kDepth<bf16>;
}

// ---- the workspace: counters, exchange, state --------------------------------------------------

inline size_t counter_bytes(const Sizes& of) {
  return size_t(of.D * ceil_div(of.B, kTileRows) * kCounterStride) * sizeof(unsigned);
}

inline size_t exchange_bytes(const Sizes& of, int64_t columns) {
  const int64_t pitch = columns * ceil_div(of.H, depth_of(of.dtype)) * depth_of(of.dtype);
  return size_t(of.D * 2 * ceil_div(of.B, kTileRows) * kTileRows * pitch * bytes_of(of.dtype));
}

inline size_t workspace_bytes(const Sizes& of, int64_t columns) {
  return counter_bytes(of) + exchange_bytes(of, columns) +
         size_t(2 * of.D * of.B * of.H) * sizeof(float);
}

// ---- the plan ----------------------------------------------------------------------------------

// As few hidden units a block as the multiprocessors allow, then as many groups of rows.
inline cudaError_t make_plan(Plan& plan, const Sizes& of, int64_t columns) {
  int multiprocessors = 0, max_smem = 0;
  cudaError_t error = multiprocessor_count(&multiprocessors);
  if (error == cudaSuccess) error = max_dynamic_smem(&max_smem);
  if (error != cudaSuccess) return error;

  const int64_t unit_tiles = ceil_div(of.H, kTileUnits), blocks = multiprocessors / of.D;
  if (blocks == 0) return cudaErrorInvalidValue;
  plan.unit_tiles = int(ceil_div(unit_tiles, blocks));
  plan.slices = int(ceil_div(unit_tiles, plan.unit_tiles));
  plan.chunks = int(ceil_div(of.H, depth_of(of.dtype)));
  const int64_t row_tiles = ceil_div(of.B, kTileRows);
  const int64_t group_tiles = ceil_div(row_tiles, std::min(row_tiles, blocks / plan.slices));
  plan.groups = int(ceil_div(row_tiles, group_tiles));
  plan.group_rows = int(group_tiles * kTileRows);

  const int64_t fragment = kTileUnits * depth_of(of.dtype) * bytes_of(of.dtype);
  const int64_t weights = plan.unit_tiles * of.G() * plan.chunks * fragment;
  const int64_t parts = kWarps * (of.G() / columns) * kTileValues * int64_t(sizeof(float));
  plan.tiles = int(std::min<int64_t>({kTiles, group_tiles, (max_smem - weights) / parts}));
  plan.smem = size_t(weights + plan.tiles * parts);
  return plan.tiles > 0 ? cudaSuccess : cudaErrorInvalidValue;  // else it does not fit on chip
}

// ---- tables and launches -----------------------------------------------------------------------

template <class Call>
struct Kernel {
  const char* name;
  Dtype dtype;
  int gates;
  void (*function)(Work<Call>);
};

template <class Call, size_t COUNT>
int list(const Kernel<Call> (&table)[COUNT], KernelInfo* out, int capacity) {
  for (int i = 0; i < int(COUNT) && i < capacity; ++i) {
    out[i] = kernel_info(table[i].name, table[i].function, 0);
  }
  return int(COUNT);
}

template <class Call, size_t COUNT>
int launch_persistent(const Kernel<Call> (&table)[COUNT], const Call& call, int64_t columns,
                      void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const Sizes& of = call.of;
  Work<Call> work = {call, {}};
  Plan& plan = work.plan;
  cudaError_t error = make_plan(plan, of, columns);
  if (error != cudaSuccess) return error;

  auto* const workspace = static_cast<unsigned char*>(call.workspace);
  const size_t shared = counter_bytes(of) + exchange_bytes(of, columns);
  plan.counters = reinterpret_cast<unsigned*>(workspace);
  plan.exchange = workspace + counter_bytes(of);
  plan.state = reinterpret_cast<float*>(workspace + shared);
  error = clear(workspace, shared, stream);  // the counters; what pads a row of the exchange
  if (error != cudaSuccess) return error;
  const dim3 grid(unsigned(plan.slices), unsigned(plan.groups), unsigned(of.D));
  for (const Kernel<Call>& kernel : table) {
    if (kernel.dtype == of.dtype && kernel.gates == of.G()) {
      return launch_cooperative(kernel.function, grid, dim3(kThreads), plan.smem, stream, work);
    }
  }
  return cudaErrorInvalidValue;
}

}  // namespace bigkern::recurrent::cuda
