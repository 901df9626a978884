// Sixteen floats at a time, for sources under csrc/cpu/simd: one AVX-512, two AVX2 or four SSE registers.
// Every operation gives the same bits on every instruction set, sums included: lanes never depend on the register size,
// and fma is fused everywhere (emulated where the processor has none). zs_simd_math.h, included at the end, adds exp,
// log and their relatives.
//
//   Floats x = load(logits + i), y = load(logits + i, count, -INFINITY);     // the second reads count < 16 elements
//   store(out + i, select(x > y, exp(x), 0.0f));  store(out + i, x, count);
//   float total = sum(x), largest = max_lane(x);
//
// Elements are float, Bf16 or Half: conversion happens in load and store, rounding to nearest even.
// Keep templates of the standard library out of these sources: the linker may keep one instruction set's copy for all.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // what the header calls undefined, GCC 12 takes for a mistake
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#ifndef ZS_ISA
#error "zs_simd.h is for sources under csrc/cpu/simd, which are compiled with ZS_ISA set"
#endif

#define ZS_INLINE inline __attribute__((always_inline))
#define ZS_PARTS _Pragma("GCC unroll 4") for (int p = 0; p < kParts; ++p)

namespace zs::ZS_ISA {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
constexpr int kLanes = 16;
constexpr int kParts = 64 / kRegisterBytes;
constexpr int kPartLanes = kLanes / kParts;

typedef float FloatPart __attribute__((vector_size(kRegisterBytes)));
typedef int32_t IntPart __attribute__((vector_size(kRegisterBytes)));
typedef uint32_t UintPart __attribute__((vector_size(kRegisterBytes)));

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// All ones where true, else zero.
struct Mask {
  IntPart part[kParts];
};
struct Uints {
  UintPart part[kParts];
  Uints() = default;
  ZS_INLINE Uints(uint32_t x) { ZS_PARTS part[p] = UintPart{} + x; }
};
struct Floats {
  FloatPart part[kParts];
  Floats() = default;
  ZS_INLINE Floats(float x) { ZS_PARTS part[p] = FloatPart{} + x; }
};

#define ZS_BINARY(Result, operation, Argument)                     \
  ZS_INLINE Result operator operation(Argument a, Argument b) {    \
    Result r;                                                      \
    ZS_PARTS r.part[p] = a.part[p] operation b.part[p];            \
    return r;                                                      \
  }
ZS_BINARY(Floats, +, Floats)
ZS_BINARY(Floats, -, Floats)
ZS_BINARY(Floats, *, Floats)
ZS_BINARY(Floats, /, Floats)
ZS_BINARY(Mask, <, Floats)
ZS_BINARY(Mask, <=, Floats)
ZS_BINARY(Mask, >, Floats)
ZS_BINARY(Mask, >=, Floats)
ZS_BINARY(Mask, ==, Floats)
ZS_BINARY(Mask, !=, Floats)
ZS_BINARY(Mask, &, Mask)
ZS_BINARY(Mask, |, Mask)
ZS_BINARY(Uints, +, Uints)
ZS_BINARY(Uints, -, Uints)
ZS_BINARY(Uints, &, Uints)
ZS_BINARY(Uints, |, Uints)
ZS_BINARY(Uints, ^, Uints)
#undef ZS_BINARY

ZS_INLINE Uints operator<<(Uints a, int n) {
  ZS_PARTS a.part[p] <<= n;
  return a;
}
ZS_INLINE Uints operator>>(Uints a, int n) {
  ZS_PARTS a.part[p] >>= n;
  return a;
}
ZS_INLINE Mask operator~(Mask a) {
  ZS_PARTS a.part[p] = ~a.part[p];
  return a;
}
ZS_INLINE Floats operator-(Floats a) {
  ZS_PARTS a.part[p] = -a.part[p];
  return a;
}
ZS_INLINE Floats& operator+=(Floats& a, Floats b) { return a = a + b; }
ZS_INLINE Floats& operator-=(Floats& a, Floats b) { return a = a - b; }
ZS_INLINE Floats& operator*=(Floats& a, Floats b) { return a = a * b; }

ZS_INLINE Uints bits_of(Floats a) {
  Uints r;
  ZS_PARTS r.part[p] = (UintPart)a.part[p];
  return r;
}
ZS_INLINE Floats floats_of(Uints a) {
  Floats r;
  ZS_PARTS r.part[p] = (FloatPart)a.part[p];
  return r;
}
ZS_INLINE Floats select(Mask where, Floats yes, Floats no) {
  Floats r;
  ZS_PARTS r.part[p] = where.part[p] ? yes.part[p] : no.part[p];
  return r;
}
ZS_INLINE Uints select_bits(Mask where, Uints yes, Uints no) {
  Uints r;
  ZS_PARTS r.part[p] = where.part[p] ? yes.part[p] : no.part[p];
  return r;
}
ZS_INLINE Mask unordered(Floats a) { return a != a; }
ZS_INLINE bool any(Mask a) {
  IntPart all = a.part[0];
  for (int p = 1; p < kParts; ++p) all |= a.part[p];
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)all, (__m512i)all) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)all) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_ps((__m128)all) != 0;
#else
  int32_t found = 0;
  for (int i = 0; i < kPartLanes; ++i) found |= all[i];
  return found != 0;
#endif
}

// a where a > b, else b: hence b where either is NaN.
ZS_INLINE Floats max(Floats a, Floats b) {
#if defined(__AVX512F__)
  ZS_PARTS a.part[p] = (FloatPart)_mm512_max_ps((__m512)a.part[p], (__m512)b.part[p]);
#elif defined(__AVX2__)
  ZS_PARTS a.part[p] = (FloatPart)_mm256_max_ps((__m256)a.part[p], (__m256)b.part[p]);
#elif defined(__x86_64__)
  ZS_PARTS a.part[p] = (FloatPart)_mm_max_ps((__m128)a.part[p], (__m128)b.part[p]);
#else
  ZS_PARTS a.part[p] = a.part[p] > b.part[p] ? a.part[p] : b.part[p];
#endif
  return a;
}
// a where a < b, else b: hence b where either is NaN.
ZS_INLINE Floats min(Floats a, Floats b) {
#if defined(__AVX512F__)
  ZS_PARTS a.part[p] = (FloatPart)_mm512_min_ps((__m512)a.part[p], (__m512)b.part[p]);
#elif defined(__AVX2__)
  ZS_PARTS a.part[p] = (FloatPart)_mm256_min_ps((__m256)a.part[p], (__m256)b.part[p]);
#elif defined(__x86_64__)
  ZS_PARTS a.part[p] = (FloatPart)_mm_min_ps((__m128)a.part[p], (__m128)b.part[p]);
#else
  ZS_PARTS a.part[p] = a.part[p] < b.part[p] ? a.part[p] : b.part[p];
#endif
  return a;
}
ZS_INLINE Floats abs(Floats a) { return floats_of(bits_of(a) & 0x7fffffffu); }
ZS_INLINE Floats copy_sign(Floats size, Floats sign) {
  return floats_of((bits_of(size) & 0x7fffffffu) | (bits_of(sign) & 0x80000000u));
}

// a * b + c, rounded once, for a processor without the instruction. The product is exact in double; its sum with c is
// rounded to odd, so that rounding a second time, to float, is as good as rounding once.
inline float fused_multiply_add(float a, float b, float c) {
#if defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, c);
#else
  const double product = static_cast<double>(a) * b, addend = c;
  double total = product + addend;
  const double part = total - product;
  const double lost = (product - (total - part)) + (addend - part);
  int64_t bits;
  std::memcpy(&bits, &total, sizeof bits);
  if ((lost > 0.0 || lost < 0.0) && !(bits & 1)) {
    bits += (lost > 0.0) == (total > 0.0) ? 1 : -1;
    std::memcpy(&total, &bits, sizeof bits);
  }
  return static_cast<float>(total);
#endif
}
// a * b + c, rounded once.
#if defined(__AVX512F__)
ZS_INLINE FloatPart fma_part(FloatPart a, FloatPart b, FloatPart c) {
  return (FloatPart)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#elif defined(__AVX2__)
ZS_INLINE FloatPart fma_part(FloatPart a, FloatPart b, FloatPart c) {
  return (FloatPart)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#elif defined(__x86_64__)
inline __attribute__((noinline)) FloatPart fma_part(FloatPart a, FloatPart b, FloatPart c) {
  // Rounding the sum to double first goes wrong only where that lands half way between two floats, or below the
  // smallest normal one: rarely, and then the slow way is taken.
  const auto sum = [](__m128 x, __m128 y, __m128 z) {
    return _mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(x), _mm_cvtps_pd(y)), _mm_cvtps_pd(z));
  };
  const auto doubtful = [](__m128d x) {
    const __m128i low = _mm_and_si128(_mm_castpd_si128(x), _mm_set1_epi64x(0x1fffffff));
    const __m128i half_way = _mm_cmpeq_epi32(low, _mm_set1_epi64x(static_cast<int64_t>(0xffffffff10000000ull)));
    const __m128d size = _mm_andnot_pd(_mm_set1_pd(-0.0), x);
    const __m128d small = _mm_and_pd(_mm_cmplt_pd(size, _mm_set1_pd(0x1p-126)), _mm_cmpneq_pd(x, _mm_setzero_pd()));
    return _mm_or_si128(half_way, _mm_castpd_si128(small));
  };
  const __m128 x = (__m128)a, y = (__m128)b, z = (__m128)c;
  const __m128d first = sum(x, y, z);
  const __m128d second = sum(_mm_movehl_ps(x, x), _mm_movehl_ps(y, y), _mm_movehl_ps(z, z));
  if (_mm_movemask_epi8(_mm_or_si128(doubtful(first), doubtful(second))) == 0)
    return (FloatPart)_mm_movelh_ps(_mm_cvtpd_ps(first), _mm_cvtpd_ps(second));
  for (int i = 0; i < kPartLanes; ++i) a[i] = fused_multiply_add(a[i], b[i], c[i]);
  return a;
}
#else
ZS_INLINE FloatPart fma_part(FloatPart a, FloatPart b, FloatPart c) {
  for (int i = 0; i < kPartLanes; ++i) a[i] = fused_multiply_add(a[i], b[i], c[i]);
  return a;
}
#endif
ZS_INLINE Floats fma(Floats a, Floats b, Floats c) {
  ZS_PARTS a.part[p] = fma_part(a.part[p], b.part[p], c.part[p]);
  return a;
}

// --- rounding to and from 16 bits ---

// The upper 16 bits of each lane hold the nearest bfloat16 (ties to even), the lower ones anything. A NaN stays one
// if it came from a bfloat16 or out of arithmetic; one with all bits set, as in memory never written, would become 0.
ZS_INLINE Uints round_number_to_bf16(Floats x) {
  const Uints u = bits_of(x);
  return u + 0x7fffu + ((u >> 16) & 1u);
}
// The same for every NaN.
ZS_INLINE Uints round_to_bf16(Floats x) {
  return select_bits(unordered(x), bits_of(x) | 0x00400000u, round_number_to_bf16(x));
}

// One part at a time: a struct copied as a whole would live in memory instead of registers.
template <class Part>
ZS_INLINE Part load_part(const void* from) {
  Part part;
  std::memcpy(&part, from, sizeof part);
  return part;
}
ZS_INLINE Floats load(const float* from) {
  Floats r;
  ZS_PARTS r.part[p] = load_part<FloatPart>(from + p * kPartLanes);
  return r;
}
ZS_INLINE void store(float* to, Floats x) {
  ZS_PARTS std::memcpy(to + p * kPartLanes, &x.part[p], sizeof(FloatPart));
}

ZS_INLINE Floats load(const Bf16* from) {
  Uints r;
#if defined(__AVX512F__)
  r.part[0] = (UintPart)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  ZS_PARTS r.part[p] =
      (UintPart)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + p * kPartLanes)));
#else
  ZS_PARTS for (int i = 0; i < kPartLanes; ++i) r.part[p][i] = from[p * kPartLanes + i].bits;
#endif
  return floats_of(r << 16);
}
ZS_INLINE void store(Bf16* to, Floats x) {
  const Uints u = round_to_bf16(x) >> 16;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)u.part[0]));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)u.part[0], (__m256i)u.part[1]);  // quarters 0 2 1 3
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
#else
  ZS_PARTS for (int i = 0; i < kPartLanes; ++i) to[p * kPartLanes + i].bits = static_cast<uint16_t>(u.part[p][i]);
#endif
}

ZS_INLINE Floats load(const Half* from) {
#if defined(__AVX512F__)
  Floats r;
  r.part[0] = (FloatPart)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return r;
#elif defined(__AVX2__)
  Floats r;
  ZS_PARTS r.part[p] =
      (FloatPart)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + p * kPartLanes)));
  return r;
#else
  Uints h;
  ZS_PARTS for (int i = 0; i < kPartLanes; ++i) h.part[p][i] = from[p * kPartLanes + i].bits;
  // The exponent's bias differs by 112; multiplying by 2^112 also makes the small (denormal) ones right.
  const Floats size = floats_of((h & 0x7fffu) << 13) * 0x1p112f;
  const Floats special = floats_of(bits_of(size) | 0x7f800000u);  // infinity and NaN
  return copy_sign(select(size >= 65536.0f, special, size), floats_of(h << 16));
#endif
}
ZS_INLINE void store(Half* to, Floats x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)x.part[0], _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  ZS_PARTS _mm_storeu_si128(reinterpret_cast<__m128i*>(to + p * kPartLanes),
                            _mm256_cvtps_ph((__m256)x.part[p], _MM_FROUND_TO_NEAREST_INT));
#else
  const Floats size = abs(x);
  // Denormal halves: adding 0.5 leaves the multiple of 2^-24 in the lowest bits, rounded as any sum is.
  const Uints small = bits_of(size + 0.5f) - 0x3f000000u;
  const Uints u = bits_of(size);
  const Uints normal = (u + 0xfffu + ((u >> 13) & 1u) - 0x38000000u) >> 13;
  Uints h = select_bits(size < 0x1p-14f, small, normal);
  h = select_bits(size >= 65520.0f, 0x7c00u, h);
  h = select_bits(unordered(x), Uints(0x7e00u) | ((u >> 13) & 0x3ffu), h);
  h = h | ((bits_of(x) & 0x80000000u) >> 16);
  ZS_PARTS for (int i = 0; i < kPartLanes; ++i) to[p * kPartLanes + i].bits = static_cast<uint16_t>(h.part[p][i]);
#endif
}

// The first `count` lanes; the others get `fill`, and no memory past them is read.
template <class T>
ZS_INLINE Floats load(const T* from, int64_t count, float fill) {
  alignas(64) float lanes[kLanes];
  T some[kLanes] = {};
  std::memcpy(some, from, static_cast<size_t>(count) * sizeof(T));
  store(lanes, load(some));
  for (int64_t i = count; i < kLanes; ++i) lanes[i] = fill;
  return load(lanes);
}
// Writes the first `count` lanes and nothing past them.
template <class T>
ZS_INLINE void store(T* to, Floats x, int64_t count) {
  T some[kLanes];
  store(some, x);
  std::memcpy(to, some, static_cast<size_t>(count) * sizeof(T));
}
template <class T>
ZS_INLINE float load_one(const T* from) {
  return load(from, 1, 0.0f).part[0][0];
}
template <class T>
ZS_INLINE void store_one(T* to, float x) {
  store(to, Floats(x), 1);
}
template <>
ZS_INLINE float load_one(const float* from) {
  return *from;
}
template <>
ZS_INLINE void store_one(float* to, float x) {
  *to = x;
}

// --- over the lanes, always in one order: lane i with i + 8, then i + 4, i + 2, i + 1 ---

#define ZS_FOLD(name, combine)                                                                   \
  ZS_INLINE float name(Floats x) {                                                               \
    alignas(64) float lane[kLanes];                                                              \
    store(lane, x);                                                                              \
    for (int width = kLanes / 2; width > 0; width /= 2)                                          \
      for (int i = 0; i < width; ++i) lane[i] = combine(lane[i], lane[i + width]);               \
    return lane[0];                                                                              \
  }
ZS_INLINE float add_lanes(float a, float b) { return a + b; }
ZS_INLINE float larger_lane(float a, float b) { return a > b || a != a ? a : b; }
ZS_INLINE float smaller_lane(float a, float b) { return a < b || a != a ? a : b; }
ZS_FOLD(sum, add_lanes)
ZS_FOLD(max_lane, larger_lane)   // NaN where a lane is NaN
ZS_FOLD(min_lane, smaller_lane)  // NaN where a lane is NaN
#undef ZS_FOLD

// Into the second cache: a processor keeps few lines on their way to the first one, and where their queue is full, the
// instructions behind wait, and nothing is computed meanwhile.
ZS_INLINE void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

}  // namespace zs::ZS_ISA

#include "zs_simd_math.h"
