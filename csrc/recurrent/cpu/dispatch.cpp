// Recurrent layers on the CPU: picks the kernels of the machine's instruction set.

#include "recurrent/recurrent.h"

#define BIGKERN_KERNELS "recurrent/cpu/kernels.inl"
#include "common/cpu/foreach_isa.h"

namespace bigkern::recurrent::cpu {
namespace {

template <class Result, class Params, class Extra>
using PerIsa = Result (*const[isa_count])(const Params&, Extra);

constexpr PerIsa<void, Layer, const Parallel&> layers = BIGKERN_PER_ISA(layer);
constexpr PerIsa<void, ScanBackward, const Parallel&> scan_backwards =
    BIGKERN_PER_ISA(scan_backward);
constexpr PerIsa<size_t, Layer, int> layer_workspaces = BIGKERN_PER_ISA(layer_workspace);
constexpr PerIsa<size_t, ScanBackward, int> scan_backward_workspaces =
    BIGKERN_PER_ISA(scan_backward_workspace);

int level() { return static_cast<int>(isa()); }

}  // namespace

size_t layer_workspace(const Layer& call, int threads) {
  return layer_workspaces[level()](call, threads);
}
size_t scan_backward_workspace(const ScanBackward& call, int threads) {
  return scan_backward_workspaces[level()](call, threads);
}
void layer(const Layer& call, const Parallel& parallel) { layers[level()](call, parallel); }
void scan_backward(const ScanBackward& call, const Parallel& parallel) {
  scan_backwards[level()](call, parallel);
}

}  // namespace bigkern::recurrent::cpu
