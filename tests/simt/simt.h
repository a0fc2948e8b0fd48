// The CUDA execution model on the host, for tests: see README.md in this folder.
//
// Every CUDA thread of a block is a fiber; the blocks of a grid run one after the other, or, in a
// cooperative launch, all at once. A fiber runs until it has to wait for other threads, in a
// barrier or in a warp operation such as a shuffle, and then another one is chosen at random. What
// cannot go on is reported as a fault.
#pragma once

#include "simt/names.h"

// What every CUDA thread can ask about itself. The emulator sets them whenever it switches.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;

namespace bigkern::simt {

constexpr int kMaxThreads = 1024;               // in a block
constexpr int kMaxWarps = kMaxThreads / 32;     // in a block
constexpr size_t kMaxDynamicSmem = 227 * 1024;  // bytes, what sm_90 grants

// Small on purpose: persistent kernels go round their loops several times. A multiprocessor holds
// one block of a cooperative launch.
constexpr int kMultiprocessors = 4;

// Where in the kernel's source an operation stands. As a default argument, here() is the caller.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// ---- for tests ---------------------------------------------------------------------------------

// Chooses the schedule of the launches to come; the same seed gives the same schedule. Without a
// call it is the environment variable BIGKERN_SIMT_SEED, or 1.
void set_seed(uint64_t seed);

// What went wrong in the last launch that failed.
const char* last_error();

// ---- for launch.cuh and the device headers -----------------------------------------------------

struct Launch {
  const void* kernel;
  dim3 grid, block;
  size_t smem_bytes;
  bool cooperative;                   // all blocks are alive at once, and may wait for each other
  void (*body)(const void* context);  // called once for each thread of the grid
  const void* context;
};
cudaError_t run_grid(const Launch& launch);

// Ends the launch with an error; the thread that calls it never runs again.
[[noreturn]] void fault(const char* what, Site site);

void* dynamic_smem();

inline void check_aligned(const void* address, int bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % unsigned(bytes) != 0) {
    fault("misaligned address", site);
  }
}

// A warp operation: the lanes named in mask bring their operands; when all have come, the last one
// calls execute, which reads and writes the operands of all of them, and everyone goes on.
using ExecuteWarp = void (*)(void* const* operands, uint32_t mask);
void warp_op(const char* name, uint32_t mask, void* operands, ExecuteWarp execute, Site site);

// Waits for the block's other threads; exited ones do not count.
struct BarrierResult {
  int participants;
  int predicates;  // how many of them came with a predicate that holds
};
BarrierResult block_barrier(const char* name, bool predicate, Site site);

void named_barrier(int id, int threads, bool wait, Site site);

// Waits until *counter is value or more.
void wait_at_least(const unsigned* counter, unsigned value, Site site);

// A copy that is issued poisons its destination; it lands when its group is waited for.
void async_copy(void* destination, const void* source, int bytes, bool valid, Site site);
void async_commit();
void async_wait(int groups_in_flight);

// ---- shuffles and votes ------------------------------------------------------------------------

template <class T>
T shuffle(const char* name, uint32_t mask, T value, int source_lane, Site site) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "CUDA has no such shuffle");
  struct Lane {
    T value;
    int source;
    T result;
  };
  Lane self{value, source_lane, value};
  const auto exchange = [](void* const* lanes, uint32_t mask) {
    for (int i = 0; i < warpSize; ++i) {
      if (!(mask >> i & 1)) continue;
      Lane& lane = *static_cast<Lane*>(lanes[i]);
      if (mask >> lane.source & 1) {
        lane.result = static_cast<Lane*>(lanes[lane.source])->value;
      } else {
        memset(&lane.result, 0xff, sizeof(T));  // Undefined on a GPU: a lane that takes no part.
      }
    }
  };
  warp_op(name, mask, &self, exchange, site);
  return self.result;
}

// The lane of this thread, within the warp.
int lane_id();

// Returns the mask of the lanes whose predicate holds.
uint32_t vote(const char* name, uint32_t mask, bool predicate, Site site);

}  // namespace bigkern::simt

// A width below 32 cuts the warp into segments that shuffle among themselves; a source outside the
// own segment means the own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              bigkern::simt::Site site = bigkern::simt::Site::here()) {
  const int first = bigkern::simt::lane_id() & -width;
  return bigkern::simt::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  bigkern::simt::Site site = bigkern::simt::Site::here()) {
  const int lane = bigkern::simt::lane_id();
  const int source = lane ^ lane_mask;
  // CUDA lets xor read lower segments, but not higher ones.
  const bool inside = source < (lane & -width) + width;
  return bigkern::simt::shuffle("__shfl_xor_sync", mask, value, inside ? source : lane, site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 bigkern::simt::Site site = bigkern::simt::Site::here()) {
  const int lane = bigkern::simt::lane_id();
  const int source = lane - int(delta);
  const bool inside = source >= (lane & -width);
  return bigkern::simt::shuffle("__shfl_up_sync", mask, value, inside ? source : lane, site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   bigkern::simt::Site site = bigkern::simt::Site::here()) {
  const int lane = bigkern::simt::lane_id();
  const int source = lane + int(delta);
  const bool inside = source < (lane & -width) + width;
  return bigkern::simt::shuffle("__shfl_down_sync", mask, value, inside ? source : lane, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              bigkern::simt::Site site = bigkern::simt::Site::here()) {
  return bigkern::simt::vote("__ballot_sync", mask, predicate != 0, site);
}

inline int __any_sync(unsigned mask, int predicate,
                      bigkern::simt::Site site = bigkern::simt::Site::here()) {
  return bigkern::simt::vote("__any_sync", mask, predicate != 0, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      bigkern::simt::Site site = bigkern::simt::Site::here()) {
  return bigkern::simt::vote("__all_sync", mask, predicate != 0, site) == mask;
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       bigkern::simt::Site site = bigkern::simt::Site::here()) {
  bigkern::simt::warp_op("__syncwarp", mask, nullptr, [](void* const*, uint32_t) {}, site);
}

// ---- barriers of the whole block ---------------------------------------------------------------

inline void __syncthreads(bigkern::simt::Site site = bigkern::simt::Site::here()) {
  bigkern::simt::block_barrier("__syncthreads", false, site);
}

inline int __syncthreads_count(int predicate,
                               bigkern::simt::Site site = bigkern::simt::Site::here()) {
  return bigkern::simt::block_barrier("__syncthreads_count", predicate != 0, site).predicates;
}

inline int __syncthreads_or(int predicate, bigkern::simt::Site site = bigkern::simt::Site::here()) {
  return bigkern::simt::block_barrier("__syncthreads_or", predicate != 0, site).predicates != 0;
}

inline int __syncthreads_and(int predicate,
                             bigkern::simt::Site site = bigkern::simt::Site::here()) {
  const auto result = bigkern::simt::block_barrier("__syncthreads_and", predicate != 0, site);
  return result.predicates == result.participants;
}

// ---- what is left of the runtime ---------------------------------------------------------------

const char* cudaGetErrorString(cudaError_t error);
[[noreturn]] inline void __trap(bigkern::simt::Site site = bigkern::simt::Site::here()) {
  bigkern::simt::fault("__trap", site);
}
