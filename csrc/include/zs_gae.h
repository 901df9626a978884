// Generalised advantage estimation over packed sequences; formulas in kernels/zs_kernels/gae.py.
#pragma once

#include <cstdint>

#include "zs_isa.h"

namespace zs {

// What a masked token is to the recurrence: transparent; a step with reward and value 0; a step like any other.
enum class GaeMode : int64_t { carry = 0, zero = 1, classic = 2 };

struct GaeInputs {
  const float* rewards;
  const float* values;
  const bool* mask;         // null: every token counts
  const int64_t* bounds;    // sequence s is tokens bounds[s] .. bounds[s + 1] - 1
  const float* bootstrap;   // value after the last token of each sequence; null: 0
  const float* gammas;      // per sequence; null: gamma
  const float* lams;        // per sequence; null: lam
  double gamma;
  double lam;
  GaeMode mode;
};

// How many numbers, their mean, and the sum of their squared distances from it.
struct Moments {
  double count = 0.0;
  double mean = 0.0;
  double squares = 0.0;
};

// The moments of two sets together (Chan, Golub, LeVeque 1983).
inline Moments merged(const Moments& a, const Moments& b) {
  const double count = a.count + b.count;
  if (count == 0.0) return {};
  const double apart = b.mean - a.mean;
  return {count, a.mean + apart * (b.count / count), a.squares + b.squares + apart * apart * (a.count * b.count / count)};
}

}  // namespace zs

// Advantages and returns of sequences first .. last - 1, and the moments of each one's unmasked advantages (null: not
// asked). Each sequence's sums run in double from its last token to its first, whatever stands beside it.
ZS_DECLARE(void gae_sequences(const zs::GaeInputs& inputs, int64_t first, int64_t last, float* advantages,
                              float* returns, zs::Moments* moments))
// out = (values - mean) * scale + shift where the mask (null: everywhere) holds, 0 elsewhere; out may be values.
ZS_DECLARE(void whiten(const float* values, const bool* mask, int64_t count, double mean, double scale, double shift,
                       float* out))
