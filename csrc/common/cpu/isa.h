// Which instruction set the CPU kernels run on, decided at run time.
//
// One binary holds every level (see foreach_isa.h). The highest level that the machine has is the
// default; set_isa() lowers it, so that one machine can test all the levels it has.
#pragma once

#include <atomic>

#if defined(__x86_64__)
#define BIGKERN_X86 1
#else
#define BIGKERN_X86 0
#endif

namespace bigkern {

// In rising order: each level has everything below it.
enum class Isa {
  portable = 0,    // what the compiler targets by default: SSE2 on x86-64, NEON on aarch64
  avx2 = 1,        // AVX2 + FMA + F16C
  avx512 = 2,      // AVX-512 F, DQ, BW, VL
  avx512bf16 = 3,  // the same and AVX512_BF16 (vdpbf16ps)
};

constexpr int isa_count = 4;

inline const char* isa_name(Isa isa) {
  constexpr const char* names[isa_count] = {"portable", "avx2", "avx512", "avx512bf16"};
  return names[static_cast<int>(isa)];
}

// The highest level of this machine.
inline Isa detected_isa() {
#if BIGKERN_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

namespace detail {
inline std::atomic<Isa>& current_isa() {
  static std::atomic<Isa> current{detected_isa()};
  return current;
}
}  // namespace detail

// The level that kernels run on now.
inline Isa isa() { return detail::current_isa().load(std::memory_order_relaxed); }

// Chooses the level. Returns false and changes nothing when the machine does not have it.
inline bool set_isa(Isa isa) {
  if (isa < Isa::portable || isa > detected_isa()) return false;
  detail::current_isa().store(isa, std::memory_order_relaxed);
  return true;
}

}  // namespace bigkern
