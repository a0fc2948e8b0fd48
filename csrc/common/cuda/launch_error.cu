#include "common/cuda/cuda.cuh"
#include "common/cuda/launch_error.h"

namespace bigkern {

const char* launch_error(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

}  // namespace bigkern
