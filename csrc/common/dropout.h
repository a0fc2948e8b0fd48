// What dropout keeps: a counter-based generator, so that forward, backward and every backend draw
// the same bits for the same element without storing any. Elements are (head, row, column): of
// attention's weights (b Hq + h, query, key), of a matrix (which dropout of the op it is, row,
// column).
//
//   head key   k0 = mix(key0 + head G)      k1 = mix(key1 ^ k0)
//   row key    a  = mix(k0 + i G)           c  = mix(k1 + a)             one pair a row
//   bits       mix, with c added half-way, of a + j G                    one number a column
//
// The element stays if bits >= threshold = p 2^32. mix is a bijection of 32 bits, and so is
// multiplication by the odd G: within a head no two rows have the same key. G is 2^32 / golden
// ratio; the mixer is Wellons' lowbias32 (https://nullprogram.com/blog/2018/07/31/).
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace bigkern {

constexpr uint32_t kGolden = 0x9e3779b9u, kMix1 = 0x7feb352du, kMix2 = 0x846ca68bu;

BIGKERN_HD uint32_t mix(uint32_t x, uint32_t half_way = 0) {
  x = (x ^ (x >> 16)) * kMix1 + half_way;
  x = (x ^ (x >> 15)) * kMix2;
  return x ^ (x >> 16);
}

struct DropoutRow {
  uint32_t a, c;
  BIGKERN_HD uint32_t bits(uint32_t j) const { return mix(a + j * kGolden, c); }
};

struct DropoutHead {
  uint32_t k0, k1;
  BIGKERN_HD DropoutRow row(uint32_t i) const {
    const uint32_t a = mix(k0 + i * kGolden);
    return {a, mix(k1 + a)};
  }
};

struct Dropout {
  uint32_t key0, key1;
  uint32_t threshold;  // 0: no dropout
  float scale;         // 1 / (1 - p), what is kept is multiplied by it

  BIGKERN_HD bool active() const { return threshold != 0; }
  BIGKERN_HD DropoutHead head(uint32_t h) const {
    const uint32_t k0 = mix(key0 + h * kGolden);
    return {k0, mix(key1 ^ k0)};
  }
};

}  // namespace bigkern
