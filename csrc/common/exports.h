// What _ops exports to _info by name. C linkage and plain types: the two are separate libraries.
#pragma once

#include "common/kernel_info.h"

#define BIGKERN_EXPORT extern "C" __attribute__((visibility("default")))

// The instruction set in force, as the int of bigkern::Isa.
BIGKERN_EXPORT int bigkern_isa();

// 1 if the CPU has this instruction set, and now uses it; else 0, and nothing has changed.
BIGKERN_EXPORT int bigkern_set_isa(int isa);

// Fills at most `capacity` entries and returns how many CUDA kernels there are. CUDA builds only.
BIGKERN_EXPORT int bigkern_kernels(bigkern::KernelInfo* out, int capacity);
