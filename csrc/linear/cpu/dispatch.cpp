// The linear layer on the CPU: picks the kernels of the machine's instruction set.

#include "linear/linear.h"

#define BIGKERN_KERNELS "linear/cpu/kernels.inl"
#include "common/cpu/foreach_isa.h"

namespace bigkern::linear::cpu {
namespace {

template <class Result, class Params, class Extra>
using PerIsa = Result (*const[isa_count])(const Params&, Extra);

constexpr PerIsa<void, LinearParams, const Parallel&> linears = BIGKERN_PER_ISA(linear);
constexpr PerIsa<void, LinearBackwardParams, const Parallel&> linear_backwards =
    BIGKERN_PER_ISA(linear_backward);
constexpr PerIsa<size_t, LinearParams, int> linear_workspaces = BIGKERN_PER_ISA(linear_workspace);
constexpr PerIsa<size_t, LinearBackwardParams, int> linear_backward_workspaces =
    BIGKERN_PER_ISA(linear_backward_workspace);

int level() { return static_cast<int>(isa()); }

}  // namespace

size_t linear_workspace(const LinearParams& params, int threads) {
  return linear_workspaces[level()](params, threads);
}
size_t linear_backward_workspace(const LinearBackwardParams& params, int threads) {
  return linear_backward_workspaces[level()](params, threads);
}
void linear(const LinearParams& params, const Parallel& parallel) {
  linears[level()](params, parallel);
}
void linear_backward(const LinearBackwardParams& params, const Parallel& parallel) {
  linear_backwards[level()](params, parallel);
}

}  // namespace bigkern::linear::cpu
