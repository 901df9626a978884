// One block of a row of logits: its way to z, and powers of two of it; for sources under csrc/cpu/simd, like zs_simd.h.
#pragma once

#include <cmath>

#include "zs_simd.h"

namespace zs::ZS_ISA {

constexpr float kNothing = -INFINITY;  // a logit without probability

// Up to 16, most often 16.
template <class T>
ZS_INLINE Floats load_some(const T* from, int64_t count, float fill) {
  return count >= kLanes ? load(from) : load(from, count, fill);
}
template <class T>
ZS_INLINE void store_some(T* to, Floats x, int64_t count) {
  if (count >= kLanes) store(to, x);
  else store(to, x, count);
}

// 32 logits as two vectors, in the order that costs least: bfloat16 by even and odd places, others by halves.
ZS_INLINE void load_pair(const float* from, Floats& a, Floats& b) {
  a = load(from);
  b = load(from + kLanes);
}
ZS_INLINE void load_pair(const Half* from, Floats& a, Floats& b) {
  a = load(from);
  b = load(from + kLanes);
}
ZS_INLINE void load_pair(const Bf16* from, Floats& a, Floats& b) {
  Uints both;
  ZS_PARTS both.part[p] = load_part<UintPart>(from + 2 * p * kPartLanes);
  a = floats_of(both << 16);
  b = floats_of(both & 0xffff0000u);
}
// The same way back, which exists where in and out are of one type.
ZS_INLINE void store_pair(Bf16* to, Floats a, Floats b) {
  const Uints both = (round_number_to_bf16(a) >> 16) | (round_number_to_bf16(b) & 0xffff0000u);
  ZS_PARTS std::memcpy(to + 2 * p * kPartLanes, &both.part[p], sizeof(UintPart));
}

// The logits' way to z, all but the temperature; `offset` keeps exponents small where z / temperature is huge.
struct Transform {
  const float* bias;
  float softcap;
  bool bias_first;
  float offset = 0.0f;

  bool idle() const { return !bias && softcap == 0.0f && offset == 0.0f; }

  struct Both {
    Floats z, slope;  // and the softcap's derivative
  };
  template <bool kSoftcap>
  ZS_INLINE Both apply(Floats x, Floats bias_here) const {
    Both made{x, 1.0f};
    if (bias_first) made.z += bias_here;
    if constexpr (kSoftcap) {
      const Floats t = tanh(made.z * (1.0f / softcap));
      made.slope = Floats(1.0f) - t * t;
      made.z = select(made.z == kNothing, kNothing, t * softcap);
    }
    if (!bias_first) made.z += bias_here;
    made.z -= offset;
    return made;
  }
  // One block that starts `begin` logits into the row; `slopes` may be null.
  template <bool kSoftcap, class T>
  void block_as(const T* logits, int64_t begin, int64_t count, float* z, float* slopes) const {
    const Transform here = *this;  // a copy that no store through `z` can change
    for (int64_t i = 0; i < count; i += kLanes) {
      const Floats bias_here = here.bias ? load_some(here.bias + begin + i, count - i, 0.0f) : Floats(0.0f);
      const Both made = here.apply<kSoftcap>(load_some(logits + begin + i, count - i, kNothing), bias_here);
      store_some(z + i, made.z, count - i);
      if (slopes) store_some(slopes + i, made.slope, count - i);
    }
  }
  template <class T>
  void block(const T* logits, int64_t begin, int64_t count, float* z, float* slopes) const {
    if (softcap != 0.0f) block_as<true>(logits, begin, count, z, slopes);
    else block_as<false>(logits, begin, count, z, slopes);
  }
  template <class T>
  float one(const T* logits, int64_t i, float* slope) const {
    const Floats x = load_one(logits + i), bias_here = bias ? bias[i] : 0.0f;
    const Both made = softcap != 0.0f ? apply<true>(x, bias_here) : apply<false>(x, bias_here);
    *slope = made.slope.part[0][0];
    return made.z.part[0][0];
  }
};

// factor * 2^(scale z - exponent) for a whole exponent: 0 where that is below 2^-126.
// Powers of two come out of scale z itself, so that the rest is exact whatever the size of z.
template <int kDegree>
struct PowerOfTwo {
  float scale, push, lowest, highest;
  float coefficient[kDegree + 1];

  PowerOfTwo(double scale_, double exponent, double factor) {
    // Least largest relative error on [-1/2, 1/2] with 1 at 0: 9.4e-8; where the result is rounded to 16 bits, 2.9e-6.
    constexpr float five[6] = {1.0f,           0x1.62e42ap-1f, 0x1.ebf9c2p-3f,
                               0x1.c6b6d8p-5f, 0x1.3ce8b0p-7f, 0x1.5bda7ap-10f};
    constexpr float four[5] = {1.0f, 0x1.62e12cp-1f, 0x1.ec0370p-3f, 0x1.c9fc78p-5f, 0x1.3a04eap-7f};
    scale = static_cast<float>(scale_);
    push = static_cast<float>(12582912.0 + 127.0 - exponent);
    lowest = static_cast<float>((exponent - 127.0) / scale_);
    highest = static_cast<float>((exponent + 120.0) / scale_);
    for (int k = 0; k <= kDegree; ++k)
      coefficient[k] = static_cast<float>(factor * (kDegree == 5 ? five[k] : four[k]));
  }
  // z that would give less than 2^-126, and -inf, become a finite one that gives 0. NaN stays.
  ZS_INLINE Floats clamp(Floats z) const { return max(lowest, z); }
  // And z that would give more than 2^120 one that gives that, where a sum has yet to find its power of two.
  ZS_INLINE Floats clamp_both(Floats z) const { return min(highest, max(lowest, z)); }
  ZS_INLINE Floats operator()(Floats clamped) const {
    const Floats pushed = fma(clamped, scale, push);  // the fraction falls off its end; its exponent field is the power
    const Floats r = fma(clamped, scale, push - pushed);
    Floats q = coefficient[kDegree];
#pragma GCC unroll 8
    for (int k = kDegree - 1; k >= 0; --k) q = fma(q, r, coefficient[k]);
    return q * floats_of(bits_of(pushed) << 23);
  }
};

}  // namespace zs::ZS_ISA
