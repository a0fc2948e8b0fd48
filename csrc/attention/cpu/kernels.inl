// The CPU kernels, in the order in which they build on each other. Compiled once per instruction
// set.

// clang-format off
#include "common/cpu/dropout.inl"
#include "common/cpu/gemm.inl"

#include "attention/cpu/product.inl"
#include "attention/cpu/tile.inl"
#include "attention/cpu/scores.inl"
#include "attention/cpu/decode.inl"
#include "attention/cpu/forward.inl"
#include "attention/cpu/terms.inl"
#include "attention/cpu/dbias.inl"
#include "attention/cpu/backward.inl"
// clang-format on
