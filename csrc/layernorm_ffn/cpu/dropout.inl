// Dropout of a matrix, W columns at a time.
//
// Compiled once per instruction set.

#include "layernorm_ffn/layernorm_ffn.h"

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "common/cpu/dropout.inl"
#include "common/cpu/gemm.inl"
#endif

namespace bigkern::layernorm_ffn::BIGKERN_ISA {
using namespace bigkern::BIGKERN_ISA;
namespace {

// drop(x, i, j): what is left of x, columns j .. j + W of row i; x itself without dropout.
struct Drop {
  DropoutHead head;
  uint32_t threshold;
  float scale;

  Drop(const Dropout& dropout, uint32_t which)
      : head(dropout.head(which)), threshold(dropout.threshold), scale(dropout.scale) {}

  bool active() const { return threshold != 0; }
  vf operator()(vf x, int64_t i, int64_t j) const {
    if (!active()) return x;
    const DropoutRow row = head.row(uint32_t(i));
    const vu bits = draw_bits(vu{} + row.a, vu{} + row.c, vu(lanes()) + uint32_t(j));
    return select(vi(bits >= threshold), x * scale, zero());
  }
};

}  // namespace
}  // namespace bigkern::layernorm_ffn::BIGKERN_ISA
