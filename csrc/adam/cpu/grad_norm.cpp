// The norm of all gradients on the CPU: one parallel region, every gradient read once.
//
// The slices depend on the gradients alone, not on the number of threads, and so do all bits of the
// result.
#include "adam/adam.h"
#include "adam/cpu/slices.h"

#define BIGKERN_KERNELS "adam/cpu/grad_norm.inl"
#include "common/cpu/foreach_isa.h"

namespace bigkern::adam::cpu {
namespace {

using Kernel = double(const Parameter*, int64_t, int64_t, int64_t);

constexpr int kDtypes = 3;
constexpr Kernel* kKernels[kDtypes][isa_count] = {
    BIGKERN_PER_ISA(squares<float>),
    BIGKERN_PER_ISA(squares<bf16>),
    BIGKERN_PER_ISA(squares<fp16>),
};

constexpr int64_t kSlices = 256;             // at most
constexpr int64_t kSliceElements = 1 << 12;  // at least
constexpr int64_t kGrain = 8;                // slices below which a second thread does not pay

}  // namespace

float grad_norm(Dtype dtype, const Parameter* parameters, int64_t count, const Parallel& parallel) {
  const int64_t elements = elements_of(parameters, count);
  if (elements == 0) return 0.0f;
  Kernel* const kernel = kKernels[int(dtype)][int(isa())];
  const int64_t wanted = (elements + kSliceElements - 1) / kSliceElements;
  const int64_t slices = wanted < kSlices ? wanted : kSlices;
  double sums[kSlices];
  parallel.for_range(0, slices, slices < kSlices ? kGrain : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Slice slice = slice_of(elements, 1, i, slices);
      sums[i] = kernel(parameters, count, slice.begin, slice.end);
    }
  });
  double sum = 0.0;
  for (int64_t i = 0; i < slices; ++i) sum += sums[i];
  return float(std::sqrt(sum));
}

}  // namespace bigkern::adam::cpu
