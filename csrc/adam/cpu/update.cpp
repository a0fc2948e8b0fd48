// The Adam update on the CPU: one parallel region over all parameters, one pass over memory.
//
// update.inl holds the kernel, compiled once for each instruction set; here is the choice among
// them, and the steps, which advance after every thread has read them.
#include "adam/adam.h"
#include "adam/cpu/slices.h"

namespace bigkern::adam {

// What the kernel is compiled for: the types of p and g, and of m and v (uint8_t: codes), and where
// p lives.
template <class T, class M, Master MASTER>
struct Storage {
  using Param = T;
  using Moment = M;
  static constexpr Master kMaster = MASTER;
};

}  // namespace bigkern::adam

#define BIGKERN_KERNELS "adam/cpu/update.inl"
#include "common/cpu/foreach_isa.h"

namespace bigkern::adam::cpu {
namespace {

using Kernel = void(const Update&, const Parameter*, int64_t, int64_t, int64_t);

template <class STORAGE>
constexpr Kernel* kUpdate[isa_count] = BIGKERN_PER_ISA(update<STORAGE>);

constexpr Master kNone = Master::none, kF32 = Master::f32, kRest = Master::remainder;

// Indexed by dtype, moments and master; null: op.cpp has refused it.
constexpr Kernel* const* kUpdates[3][4][3] = {
    {{kUpdate<Storage<float, float, kNone>>},
     {kUpdate<Storage<float, bf16, kNone>>},
     {},
     {kUpdate<Storage<float, uint8_t, kNone>>}},

    {{kUpdate<Storage<bf16, float, kNone>>, kUpdate<Storage<bf16, float, kF32>>,
      kUpdate<Storage<bf16, float, kRest>>},
     {kUpdate<Storage<bf16, bf16, kNone>>, kUpdate<Storage<bf16, bf16, kF32>>,
      kUpdate<Storage<bf16, bf16, kRest>>},
     {},
     {kUpdate<Storage<bf16, uint8_t, kNone>>, kUpdate<Storage<bf16, uint8_t, kF32>>,
      kUpdate<Storage<bf16, uint8_t, kRest>>}},

    {{kUpdate<Storage<fp16, float, kNone>>, kUpdate<Storage<fp16, float, kF32>>},
     {kUpdate<Storage<fp16, bf16, kNone>>, kUpdate<Storage<fp16, bf16, kF32>>},
     {kUpdate<Storage<fp16, fp16, kNone>>, kUpdate<Storage<fp16, fp16, kF32>>},
     {kUpdate<Storage<fp16, uint8_t, kNone>>, kUpdate<Storage<fp16, uint8_t, kF32>>}},
};

constexpr int64_t kGrain = 1 << 14;  // elements below which a second thread does not pay

}  // namespace

void update(const Update& call, const Parameter* parameters, int64_t count,
            const Parallel& parallel) {
  if (call.found_inf != nullptr && *call.found_inf != 0.0f) return;
  Kernel* const kernel = kUpdates[int(call.dtype)][int(call.moments)][int(call.master)][int(isa())];
  const auto slice = [&](int64_t begin, int64_t end) {
    kernel(call, parameters, count, begin, end);
  };
  parallel.for_range(0, elements_of(parameters, count), kGrain, slice);
  for (int64_t i = 0; i < count; ++i) *parameters[i].step += 1.0f;
}

}  // namespace bigkern::adam::cpu
