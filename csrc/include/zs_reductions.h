// Masked moments and whitening of float32 values, on raw pointers; formulas: kernels/zs_kernels/reductions.py.
#pragma once

#include <cstdint>

#include "zs_isa.h"

namespace zs {

constexpr int64_t kMomentBlock = 2048;  // values whose mean is taken before their squares: they stay in the cache

struct MaskedMoments {
  double count = 0.0, sum = 0.0, squares = 0.0;  // squares: of the distances to the mean

  // Chan, Golub, LeVeque (1983): nothing cancels, however far the values lie from 0.
  void add(const MaskedMoments& other) {
    if (other.count == 0.0) return;
    if (count > 0.0) {
      const double distance = other.sum / other.count - sum / count;
      squares += distance * distance * count * other.count / (count + other.count);
    }
    count += other.count;
    sum += other.sum;
    squares += other.squares;
  }
};

struct WhitenRow {
  float mean, scale, offset;
  bool shifted;      // false: add the offset
  bool fill_masked;  // true: masked entries become masked_value, else the formula runs over them too
  float masked_value;
};

}  // namespace zs

// Both take at most kMomentBlock values.
ZS_DECLARE(zs::MaskedMoments masked_moments(const float* values, const bool* mask, int64_t count))
ZS_DECLARE(void whiten(const zs::WhitenRow& row, const float* values, const bool* mask, int64_t count, float* out))
