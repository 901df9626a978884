// Picks, once, the widest instruction set that both this build and this processor have.
// A source under csrc/cpu/simd is compiled per instruction set and puts its functions into `namespace zs::ZS_ISA`;
// outside, ZS_CALL(f, arguments...) calls zs::avx512::f, zs::avx2::f or zs::base::f. ZS_KERNELS_ISA in the environment
// (base, avx2, avx512) asks for a narrower one. avx512bf16 is avx512 with products of bfloat16 pairs, which round in a
// way of their own: linear_rows of bfloat16 has other last bits with it. All else is the same bits everywhere.
#pragma once

#include <cstdlib>
#include <cstring>

namespace zs {

enum class Isa { base, avx2, avx512, avx512bf16 };

inline Isa detect_isa() {
#if defined(__x86_64__)
  const char* asked = std::getenv("ZS_KERNELS_ISA");
  const bool base_only = asked && !std::strcmp(asked, "base");
  const bool no_avx512 = asked && !std::strcmp(asked, "avx2");
  if (base_only) return Isa::base;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && !no_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    const bool no_bf16 = asked && !std::strcmp(asked, "avx512");
    return !no_bf16 && __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
  }
  if (avx2) return Isa::avx2;
#endif
  return Isa::base;
}

inline Isa isa() {
  static const Isa found = detect_isa();
  return found;
}

}  // namespace zs

#if defined(__x86_64__)
#define ZS_CALL(function, ...)                                                  \
  (zs::isa() == zs::Isa::avx512bf16 ? zs::avx512bf16::function(__VA_ARGS__)     \
   : zs::isa() == zs::Isa::avx512 ? zs::avx512::function(__VA_ARGS__)           \
   : zs::isa() == zs::Isa::avx2 ? zs::avx2::function(__VA_ARGS__)               \
                                : zs::base::function(__VA_ARGS__))
// Declares one function in all namespaces: ZS_DECLARE(void f(int n))
#define ZS_DECLARE(...)                     \
  namespace zs::base { __VA_ARGS__; }       \
  namespace zs::avx2 { __VA_ARGS__; }       \
  namespace zs::avx512 { __VA_ARGS__; }     \
  namespace zs::avx512bf16 { __VA_ARGS__; }
#else
#define ZS_CALL(function, ...) (zs::base::function(__VA_ARGS__))
#define ZS_DECLARE(...) namespace zs::base { __VA_ARGS__; }
#endif
