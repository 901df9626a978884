// Pieces that the losses over tokens share; for sources under csrc/cpu/simd, like zs_simd.h.
#pragma once

#include "zs_policy_loss.h"
#include "zs_simd.h"

namespace zs::ZS_ISA {

typedef uint8_t SixteenBytes __attribute__((vector_size(16)));
typedef int32_t SixteenInts __attribute__((vector_size(64)));

// True where the bool is.
ZS_INLINE Mask load_mask(const bool* from) {
  SixteenBytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  const SixteenInts wide = __builtin_convertvector(bytes, SixteenInts) != 0;
  Mask mask;
  std::memcpy(&mask, &wide, sizeof mask);
  return mask;
}

// Sixteen tokens from n on, of which `count` are there; Whole promises all sixteen.
template <bool Whole>
struct Tokens {
  int64_t n, count;

  ZS_INLINE Floats load_from(const float* column) const {
    return Whole ? load(column + n) : load(column + n, count, 0.0f);
  }
  ZS_INLINE Floats load_from(const float* column, int64_t step) const {
    return step ? load_from(column) : Floats(*column);
  }
  ZS_INLINE void store_to(float* column, Floats x) const {
    if (Whole)
      store(column + n, x);
    else
      store(column + n, x, count);
  }
  // True where a token is there and unmasked.
  ZS_INLINE Mask counted(const bool* mask) const {
    if (Whole && mask) return load_mask(mask + n);
    bool lanes[kLanes] = {};
    for (int64_t i = 0; i < (Whole ? kLanes : count); ++i) lanes[i] = !mask || mask[n + i];
    return load_mask(lanes);
  }
};

// x within [low, high]; NaN stays NaN.
ZS_INLINE Floats bounded(Floats x, Floats low, Floats high) { return select(x < low, low, select(x > high, high, x)); }
ZS_INLINE Floats one_where(Mask where) { return select(where, 1.0f, 0.0f); }
ZS_INLINE Mask everywhere() { return Floats(0.0f) == Floats(0.0f); }

struct KlParts {
  Floats value, slope;
  Mask clamped;
};

// The estimate for d = ref_logprob - logprob, and its derivative by logprob.
template <KlEstimator Estimator>
ZS_INLINE KlParts kl_parts(Floats difference, const KlSettings& settings) {
  const Floats d = bounded(difference, -settings.bound, settings.bound);
  KlParts parts;
  if constexpr (Estimator == KlEstimator::k1) {
    parts.value = -d;
    parts.slope = 1.0f;
  } else if constexpr (Estimator == KlEstimator::k2) {
    parts.value = d * d * 0.5f;
    parts.slope = -d;
  } else if constexpr (Estimator == KlEstimator::k3) {
    // exp(d) - 1 - d cancels near 0: there the series d^2 (1/2 + d/6 + ...), exact to the last bits for |d| < 1/2.
    Floats series = fma(d, 1.0f / 3628800.0f, 1.0f / 362880.0f);
    series = fma(series, d, 1.0f / 40320.0f);
    series = fma(series, d, 1.0f / 5040.0f);
    series = fma(series, d, 1.0f / 720.0f);
    series = fma(series, d, 1.0f / 120.0f);
    series = fma(series, d, 1.0f / 24.0f);
    series = fma(series, d, 1.0f / 6.0f);
    series = fma(series, d, 0.5f) * d * d;
    const Floats power = exp(d) - 1.0f;
    const Mask near = abs(d) < 0.5f;
    parts.value = select(near, series, power - d);
    parts.slope = -select(near, series + d, power);
  } else {
    parts.value = abs(d);
    parts.slope = select(d > 0.0f, -1.0f, select(d < 0.0f, 1.0f, -d));
  }
  parts.clamped = (abs(difference) > settings.bound) | (abs(parts.value) > settings.output_bound);
  parts.value = bounded(parts.value, -settings.output_bound, settings.output_bound);
  parts.slope = settings.straight_through ? -difference : select(parts.clamped, 0.0f, parts.slope);
  return parts;
}

}  // namespace zs::ZS_ISA
