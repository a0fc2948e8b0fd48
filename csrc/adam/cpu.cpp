// The Adam update on the CPU: one parallel region over all parameters, one pass over memory.
//
// cpu_kernels.h holds the kernel, compiled once for each instruction set; here is the choice among
// them, and the steps, which advance after every thread has read them.
#include "adam/adam.h"

#define BIGKERN_KERNELS "adam/cpu_kernels.h"
#include "common/cpu/foreach_isa.h"

namespace bigkern::adam::cpu {
namespace {

using Kernel = void(const Update&, const Parameter*, int64_t, const Parallel&);

constexpr int kDtypes = 3;
constexpr Kernel* kKernels[kDtypes][isa_count] = {
    BIGKERN_PER_ISA(update<float>),
    BIGKERN_PER_ISA(update<bf16>),
    BIGKERN_PER_ISA(update<fp16>),
};

}  // namespace

void update(const Update& call, const Parameter* parameters, int64_t count,
            const Parallel& parallel) {
  if (call.found_inf != nullptr && *call.found_inf != 0.0f) return;
  kKernels[int(call.dtype)][int(isa())](call, parameters, count, parallel);
  for (int64_t i = 0; i < count; ++i) *parameters[i].step += 1.0f;
}

}  // namespace bigkern::adam::cpu
