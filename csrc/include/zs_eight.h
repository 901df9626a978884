// Eight numbers at a time, summed in double, for sources under csrc/cpu/simd: one AVX-512, two AVX2 or four SSE or NEON
// registers of doubles. Lanes never depend on the register size, so neither do the results.
// Keep templates of the standard library out of these sources: the linker may keep one instruction set's copy for all.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // what the header calls undefined, GCC 12 takes for a mistake
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#ifndef ZS_ISA
#error "zs_eight.h is for sources under csrc/cpu/simd, which are compiled with ZS_ISA set"
#endif

#define ZS_EIGHT_INLINE inline __attribute__((always_inline))
#define ZS_EIGHT_PARTS _Pragma("GCC unroll 4") for (int p = 0; p < kParts; ++p)
#define ZS_EIGHT_FLOAT_PARTS _Pragma("GCC unroll 2") for (int p = 0; p < kFloatParts; ++p)

namespace zs::ZS_ISA::eight {

constexpr int kLanes = 8;
#if defined(__AVX512F__)
constexpr int kParts = 1;
constexpr int kFloatParts = 1;
#elif defined(__AVX2__)
constexpr int kParts = 2;
constexpr int kFloatParts = 1;
#else
constexpr int kParts = 4;
constexpr int kFloatParts = 2;
#endif
constexpr int kPartLanes = kLanes / kParts;
constexpr int kFloatPartLanes = kLanes / kFloatParts;

typedef double DoublePart __attribute__((vector_size(8 * kPartLanes)));
typedef int64_t LongPart __attribute__((vector_size(8 * kPartLanes)));
typedef float NarrowPart __attribute__((vector_size(4 * kPartLanes)));
typedef float FloatPart __attribute__((vector_size(4 * kFloatPartLanes)));
typedef int32_t IntPart __attribute__((vector_size(4 * kFloatPartLanes)));
typedef float LooseFloatPart __attribute__((vector_size(4 * kFloatPartLanes), aligned(4), may_alias));

struct Floats {
  FloatPart part[kFloatParts];
};
struct Doubles {
  DoublePart part[kParts];
};
// All ones where true, else zero: for Doubles, and for Floats.
struct Mask {
  LongPart part[kParts];
};
struct FloatMask {
  IntPart part[kFloatParts];
};

// Through a pointer to an unaligned vector: memcpy is done in halves that then wait for each other.
ZS_EIGHT_INLINE Floats load(const float* from) {
  Floats r;
  ZS_EIGHT_FLOAT_PARTS r.part[p] = *reinterpret_cast<const LooseFloatPart*>(from + p * kFloatPartLanes);
  return r;
}
ZS_EIGHT_INLINE void store(float* to, const Floats& x) {
  ZS_EIGHT_FLOAT_PARTS *reinterpret_cast<LooseFloatPart*>(to + p * kFloatPartLanes) = x.part[p];
}
ZS_EIGHT_INLINE Floats floats(float x) {
  Floats r;
  ZS_EIGHT_FLOAT_PARTS r.part[p] = FloatPart{} + x;
  return r;
}
ZS_EIGHT_INLINE Doubles doubles(double x) {
  Doubles r;
  ZS_EIGHT_PARTS r.part[p] = DoublePart{} + x;
  return r;
}

ZS_EIGHT_INLINE Doubles operator+(Doubles a, const Doubles& b) {
  ZS_EIGHT_PARTS a.part[p] += b.part[p];
  return a;
}
ZS_EIGHT_INLINE Doubles operator-(Doubles a, const Doubles& b) {
  ZS_EIGHT_PARTS a.part[p] -= b.part[p];
  return a;
}
ZS_EIGHT_INLINE Doubles operator*(Doubles a, const Doubles& b) {
  ZS_EIGHT_PARTS a.part[p] *= b.part[p];
  return a;
}
ZS_EIGHT_INLINE Doubles select(const Mask& where, const Doubles& yes, const Doubles& no) {
  Doubles r;
  ZS_EIGHT_PARTS r.part[p] = where.part[p] ? yes.part[p] : no.part[p];
  return r;
}
ZS_EIGHT_INLINE Floats or_zero(const FloatMask& where, const Floats& x) {
  Floats r;
  ZS_EIGHT_FLOAT_PARTS r.part[p] = (FloatPart)((IntPart)x.part[p] & where.part[p]);
  return r;
}

ZS_EIGHT_INLINE Doubles widened(const Floats& x) {
  Doubles r;
#if defined(__AVX512F__)
  r.part[0] = (DoublePart)_mm512_cvtps_pd((__m256)x.part[0]);
#elif defined(__AVX2__)
  r.part[0] = __builtin_convertvector(__builtin_shufflevector(x.part[0], x.part[0], 0, 1, 2, 3), DoublePart);
  r.part[1] = __builtin_convertvector(__builtin_shufflevector(x.part[0], x.part[0], 4, 5, 6, 7), DoublePart);
#else
  ZS_EIGHT_FLOAT_PARTS {
    r.part[2 * p] = __builtin_convertvector(__builtin_shufflevector(x.part[p], x.part[p], 0, 1), DoublePart);
    r.part[2 * p + 1] = __builtin_convertvector(__builtin_shufflevector(x.part[p], x.part[p], 2, 3), DoublePart);
  }
#endif
  return r;
}
ZS_EIGHT_INLINE Floats narrowed(const Doubles& x) {
  Floats r;
#if defined(__AVX512F__)
  r.part[0] = (FloatPart)_mm512_cvtpd_ps((__m512d)x.part[0]);
#elif defined(__AVX2__)
  r.part[0] = __builtin_shufflevector(__builtin_convertvector(x.part[0], NarrowPart),
                                      __builtin_convertvector(x.part[1], NarrowPart), 0, 1, 2, 3, 4, 5, 6, 7);
#else
  ZS_EIGHT_FLOAT_PARTS r.part[p] =
      __builtin_shufflevector(__builtin_convertvector(x.part[2 * p], NarrowPart),
                              __builtin_convertvector(x.part[2 * p + 1], NarrowPart), 0, 1, 2, 3);
#endif
  return r;
}

// Eight bools as the bits of one byte, the first one lowest.
ZS_EIGHT_INLINE uint64_t bits_of(const bool* from) {
  uint64_t word;
  std::memcpy(&word, from, sizeof word);
  return (word * 0x0102040810204080u) >> 56;
}
ZS_EIGHT_INLINE int64_t count_of(const bool* from) {
  uint64_t word;
  std::memcpy(&word, from, sizeof word);
  return static_cast<int64_t>((word * 0x0101010101010101u) >> 56);
}
// Lane i is true where bit i of `bits` is set; higher bits are ignored.
ZS_EIGHT_INLINE Mask mask_of(uint64_t bits) {
  alignas(64) static const int64_t lane_bit[kLanes] = {1, 2, 4, 8, 16, 32, 64, 128};
  Mask r;
  ZS_EIGHT_PARTS {
    const LongPart bit = *reinterpret_cast<const LongPart*>(lane_bit + p * kPartLanes);
    r.part[p] = ((LongPart{} + static_cast<int64_t>(bits)) & bit) == bit;
  }
  return r;
}
// Lane i is true where bool i is.
ZS_EIGHT_INLINE FloatMask float_mask_of(const bool* from) {
  FloatMask r;
#if defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  r.part[0] = -(IntPart)_mm256_cvtepu8_epi32(bytes);
#else
  const int32_t bits = static_cast<int32_t>(bits_of(from));
  alignas(32) static const int32_t lane_bit[kLanes] = {1, 2, 4, 8, 16, 32, 64, 128};
  ZS_EIGHT_FLOAT_PARTS {
    const IntPart bit = *reinterpret_cast<const IntPart*>(lane_bit + p * kFloatPartLanes);
    r.part[p] = ((IntPart{} + bits) & bit) == bit;
  }
#endif
  return r;
}

// Always in one order: lane i with i + 4, then i + 2, then i + 1.
ZS_EIGHT_INLINE double sum_of_lanes(const Doubles& x) {
  double lane[kLanes];
  ZS_EIGHT_PARTS for (int i = 0; i < kPartLanes; ++i) lane[p * kPartLanes + i] = x.part[p][i];
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}
// Keeps x in memory: for what is set seldom.
ZS_EIGHT_INLINE void set_lane(Doubles& x, int lane, double number) {
  std::memcpy(reinterpret_cast<char*>(&x) + lane * sizeof number, &number, sizeof number);
}

// Rows become columns.
ZS_EIGHT_INLINE void transpose(Floats (&x)[kLanes]) {
#if defined(__AVX2__)
  FloatPart a[kLanes], b[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    a[i] = __builtin_shufflevector(x[i].part[0], x[i + 1].part[0], 0, 8, 1, 9, 4, 12, 5, 13);
    a[i + 1] = __builtin_shufflevector(x[i].part[0], x[i + 1].part[0], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < kLanes; i += 4) {
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = __builtin_shufflevector(a[i + j], a[i + 2 + j], 0, 1, 8, 9, 4, 5, 12, 13);
      b[i + 2 * j + 1] = __builtin_shufflevector(a[i + j], a[i + 2 + j], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; ++i) {
    x[i].part[0] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    x[i + 4].part[0] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#else
  Floats from[kLanes];
  for (int i = 0; i < kLanes; ++i) from[i] = x[i];
  for (int row = 0; row < 2; ++row) {
    for (int column = 0; column < 2; ++column) {
      FloatPart a[4];
      for (int i = 0; i < 4; i += 2) {
        const FloatPart upper = from[4 * row + i].part[column], lower = from[4 * row + i + 1].part[column];
        a[i] = __builtin_shufflevector(upper, lower, 0, 4, 1, 5);
        a[i + 1] = __builtin_shufflevector(upper, lower, 2, 6, 3, 7);
      }
      for (int i = 0; i < 2; ++i) {
        x[4 * column + 2 * i].part[row] = __builtin_shufflevector(a[i], a[2 + i], 0, 1, 4, 5);
        x[4 * column + 2 * i + 1].part[row] = __builtin_shufflevector(a[i], a[2 + i], 2, 3, 6, 7);
      }
    }
  }
#endif
}

// The 8 x 8 bit matrix whose row i is byte i, transposed.
ZS_EIGHT_INLINE uint64_t transpose_bits(uint64_t x) {
  uint64_t t = (x ^ (x >> 7)) & 0x00aa00aa00aa00aau;
  x ^= t ^ (t << 7);
  t = (x ^ (x >> 14)) & 0x0000cccc0000ccccu;
  x ^= t ^ (t << 14);
  t = (x ^ (x >> 28)) & 0x00000000f0f0f0f0u;
  return x ^ t ^ (t << 28);
}

}  // namespace zs::ZS_ISA::eight
