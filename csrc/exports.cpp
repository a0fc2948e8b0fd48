// The C functions that _info looks up in _ops: what these kernels run on, and what they are made
// of.
#include "common/exports.h"

#include "common/cpu/isa.h"

int bigkern_isa() { return static_cast<int>(bigkern::isa()); }

int bigkern_set_isa(int isa) { return bigkern::set_isa(static_cast<bigkern::Isa>(isa)) ? 1 : 0; }
