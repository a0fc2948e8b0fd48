// The elements of all parameters as one long row, cut wherever a thread's share ends:
//
//   parameter   |    0    |  1 | 2|          3           | 4|5|   6    |
//   slice       |-------- 0 --------|-------- 1 --------|-------- 2 ---|
//
// so ten thousand small parameters cost one parallel region. Cuts inside a parameter fall on
// multiples of kSliceStep: whole cache lines, and whole blocks of 8-bit codes.
#pragma once

#include "adam/adam.h"
#include "adam/dynamic8.h"

namespace bigkern::adam {

constexpr int64_t kSliceStep = kBlock;

inline int64_t elements_of(const Parameter* parameters, int64_t count) {
  return count == 0 ? 0 : parameters[count - 1].before + parameters[count - 1].n;
}

// The parameter that holds element `position` of the long row.
inline int64_t parameter_at(const Parameter* parameters, int64_t count, int64_t position) {
  int64_t low = 0;
  while (count > 1) {
    const int64_t half = count / 2;
    if (parameters[low + half].before <= position) low += half;
    count -= half;
  }
  return low;
}

// Where a cut falls inside a parameter: both neighbours round it the same way.
inline int64_t cut(int64_t position, const Parameter& x) {
  if (position <= x.before) return 0;
  const int64_t whole = (position - x.before + kSliceStep - 1) / kSliceStep * kSliceStep;
  return whole < x.n ? whole : x.n;
}

}  // namespace bigkern::adam
