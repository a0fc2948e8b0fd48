// Compiles one kernel source for every instruction set, in one translation unit, without any
// per-file compiler flag. An op's dispatch.cpp says
//
//   #define BIGKERN_KERNELS "adam/cpu/update.inl"
//   #include "common/cpu/foreach_isa.h"
//
//   namespace bigkern::adam::cpu {
//   using Step = int(const StepParams&, const Parallel&);
//   constexpr Step* steps[] = BIGKERN_PER_ISA(step);            one visible table
//   int step(const StepParams& p, const Parallel& parallel) {
//     return steps[static_cast<int>(isa())](p, parallel);
//   }
//   }
//
// and its kernels say
//
//   #include <algorithm>                            whatever they use, at the top
//   #include "common/cpu/gemm.inl"                  if wanted; vec.inl is there already
//   namespace bigkern::adam::BIGKERN_ISA {
//   using namespace bigkern::BIGKERN_ISA;           vf, load, store, fma, exp, ...
//   namespace { helpers }
//   int step(const StepParams& p, const Parallel& parallel) { ... }
//   }
//
// A translation unit includes this file once. Each pass defines BIGKERN_ISA (a namespace name) and
// BIGKERN_LEVEL (0..3, the value of Isa), and switches the compiler's target for the functions in
// between. Three rules keep that sound:
//   - Helpers are templates or `inline`, inside an anonymous namespace, so that no two levels and
//     no two files ever share a symbol that one of them compiled for a newer machine.
//   - A lambda that touches vectors is written `[&](vf x) BIGKERN_FN { ... }`: not every compiler
//     hands the target on to lambdas, and one with empty brackets would also convert to a plain
//     function pointer, which has the base target.
//   - Headers are included at the top of an .inl, under no #if: the first pass, which has the base
//     target, reads them all, and what is in them keeps that target.
//
// What is compiled once per instruction set is an .inl and has no include guard. An editor, and
// tests/test_cpp.py, read it by itself as well: then it includes the .inl before it, down to
// one_isa.h, which stands in for this file.
#pragma once

#include "common/cpu/isa.h"

#ifndef BIGKERN_KERNELS
#error "define BIGKERN_KERNELS as the .inl to compile once per instruction set"
#endif

// ---- portable: the target that the compiler was given -------------------------------------------
#define BIGKERN_ISA portable
#define BIGKERN_LEVEL 0
#define BIGKERN_FN
#include "common/cpu/vec.inl"
#include BIGKERN_KERNELS
#undef BIGKERN_ISA
#undef BIGKERN_LEVEL
#undef BIGKERN_FN

#if BIGKERN_X86

// ---- avx2 ---------------------------------------------------------------------------------------
#define BIGKERN_ISA avx2
#define BIGKERN_LEVEL 1
#define BIGKERN_FN __attribute__((target("avx2,fma,f16c")))
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "common/cpu/vec.inl"
#include BIGKERN_KERNELS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef BIGKERN_ISA
#undef BIGKERN_LEVEL
#undef BIGKERN_FN

// ---- avx512 -------------------------------------------------------------------------------------
#define BIGKERN_ISA avx512
#define BIGKERN_LEVEL 2
#define BIGKERN_FN \
  __attribute__((  \
      target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")))
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")
#endif
#include "common/cpu/vec.inl"
#include BIGKERN_KERNELS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef BIGKERN_ISA
#undef BIGKERN_LEVEL
#undef BIGKERN_FN

// ---- avx512bf16 ---------------------------------------------------------------------------------
#define BIGKERN_ISA avx512bf16
#define BIGKERN_LEVEL 3
#define BIGKERN_FN                                               \
  __attribute__((                                                \
      target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl," \
             "avx512bf16,prefer-vector-width=512")))
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,prefer-vector-width=512")
#endif
#include "common/cpu/vec.inl"
#include BIGKERN_KERNELS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef BIGKERN_ISA
#undef BIGKERN_LEVEL
#undef BIGKERN_FN

// The functions of that name, one per level, indexed by Isa.
#define BIGKERN_PER_ISA(function) \
  {portable::function, avx2::function, avx512::function, avx512bf16::function}

#else

#define BIGKERN_PER_ISA(function) \
  {portable::function, portable::function, portable::function, portable::function}

#endif

#undef BIGKERN_KERNELS
