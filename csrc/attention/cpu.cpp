// Attention on the CPU: the entry points, and the table of instruction sets behind them.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "attention/attention.h"
#include "attention/cpu_plan.h"

#define BIGKERN_KERNELS "attention/cpu_kernels.h"
#include "common/cpu/foreach_isa.h"

namespace bigkern::attention::cpu {

using ForwardKernel = void(const Forward&, const Parallel&);
using BackwardKernel = void(const Backward&, const Parallel&);
constexpr ForwardKernel* forwards[] = BIGKERN_PER_ISA(forward);
constexpr BackwardKernel* backwards[] = BIGKERN_PER_ISA(backward);

size_t forward_workspace(const Shape& s, int threads) {
  if (decodes(s)) return spans_workspace(s, threads);
  return scratch_bytes<ForwardScratch>(s) * static_cast<size_t>(threads);
}

size_t backward_workspace(const Shape& s, int threads) {
  size_t sums = 0;
  for (int n = 1; n <= threads; ++n) sums = std::max(sums, static_cast<size_t>(sums_count(s, n)));
  return scratch_bytes<BackwardScratch>(s) * static_cast<size_t>(threads) +
         sums * static_cast<size_t>(sums_floats(s)) * sizeof(float);
}

void forward(const Forward& call, const Parallel& parallel) {
  forwards[static_cast<int>(isa())](call, worthwhile(call.shape, parallel));
}

void backward(const Backward& call, const Parallel& parallel) {
  backwards[static_cast<int>(isa())](call, worthwhile(call.shape, parallel));
}

size_t decode_workspace(const Shape&, int) { return 0; }
void decode(const Decode&, const Parallel&) {}

}  // namespace bigkern::attention::cpu
