// Attention on the CPU: the entry points, and the table of instruction sets behind them.
#include "attention/attention.h"
#include "attention/cpu/work.h"

#define BIGKERN_KERNELS "attention/cpu/kernels.inl"
#include "common/cpu/foreach_isa.h"

namespace bigkern::attention::cpu {

using ForwardKernel = void(const Decode&, const Parallel&);
using BackwardKernel = void(const Backward&, const Parallel&);
constexpr ForwardKernel* forwards[] = BIGKERN_PER_ISA(forward);
constexpr BackwardKernel* backwards[] = BIGKERN_PER_ISA(backward);

size_t forward_workspace(const Shape& s, int threads) {
  return ForwardWorkspace(nullptr, s, threads).bytes;
}

size_t decode_workspace(const Shape& s, int threads) { return forward_workspace(s, threads); }

size_t backward_workspace(const Shape& s, int threads) {
  const auto sequence = [&](int64_t b) { return s.sequence(b); };
  return BackwardWorkspace(nullptr, s, useful_threads(s, threads, sequence)).bytes;
}

// `run` is what starts threads: none are started where one is enough.
static Parallel with_threads(const Parallel& parallel, int threads) {
  return threads == 1 ? Parallel::serial() : Parallel{parallel.run, threads};
}

void forward(const Forward& call, const Parallel& parallel) { decode(as_decode(call), parallel); }

void decode(const Decode& call, const Parallel& parallel) {
  const auto sequence = [&](int64_t b) { return sequence_of(call, b); };
  const int threads = useful_threads(call.shape, parallel.threads, sequence);
  forwards[static_cast<int>(isa())](call, with_threads(parallel, threads));
}

void backward(const Backward& call, const Parallel& parallel) {
  const auto sequence = [&](int64_t b) { return call.shape.sequence(b); };
  const int threads = useful_threads(call.shape, parallel.threads, sequence);
  backwards[static_cast<int>(isa())](call, with_threads(parallel, threads));
}

}  // namespace bigkern::attention::cpu
