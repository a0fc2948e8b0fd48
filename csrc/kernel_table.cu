// The table of all CUDA kernels, for bigkern._info and the compile-only gate.
#include "adam/cuda/kernels.h"
#include "attention/cuda/kernels.h"
#include "common/exports.h"
#include "layernorm_ffn/cuda/kernels.h"
#include "recurrent/cuda/kernels.h"

int bigkern_kernels(bigkern::KernelInfo* out, int capacity) {
  int count = 0;
  count += bigkern::attention::cuda::kernels(out + count, capacity - count);
  count += bigkern::layernorm_ffn::cuda::kernels(out + count, capacity - count);
  count += bigkern::adam::cuda::kernels(out + count, capacity - count);
  count += bigkern::recurrent::cuda::kernels(out + count, capacity - count);
  return count;
}
