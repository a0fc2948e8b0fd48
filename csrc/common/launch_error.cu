#include "common/launch_error.h"

#include "common/cuda.cuh"

namespace bigkern {

const char* launch_error(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

}  // namespace bigkern
