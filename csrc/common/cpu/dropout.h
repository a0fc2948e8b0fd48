// The generator of common/dropout.h on vectors: a lane for each element.
//
// Included once per instruction set, inside foreach_isa.h, after common/dropout.h; no include
// guard.

namespace bigkern::BIGKERN_ISA {
namespace {

inline __attribute__((always_inline)) vu mix_lanes(vu x, vu half_way) {
  x = (x ^ (x >> 16)) * kMix1 + half_way;
  x = (x ^ (x >> 15)) * kMix2;
  return x ^ (x >> 16);
}

// The bits of the columns j in rows whose keys are (a, c).
inline __attribute__((always_inline)) vu draw_bits(vu a, vu c, vu j) {
  return mix_lanes(a + j * kGolden, c);
}

}  // namespace
}  // namespace bigkern::BIGKERN_ISA
