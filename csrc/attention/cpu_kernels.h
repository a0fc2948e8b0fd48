// The CPU kernels, in the order in which they build on each other; once per instruction set.

// clang-format off
#include "common/cpu/dropout.h"
#include "common/cpu/gemm.h"

#include "attention/cpu_product.h"
#include "attention/cpu_tile.h"
#include "attention/cpu_scores.h"
#include "attention/cpu_decode.h"
#include "attention/cpu_forward.h"
#include "attention/cpu_terms.h"
#include "attention/cpu_dbias.h"
#include "attention/cpu_backward.h"
// clang-format on
