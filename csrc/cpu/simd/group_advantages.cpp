#include "zs_eight.h"
#include "zs_group_advantages.h"

namespace zs {
namespace ZS_ISA {

using namespace eight;

void sum_sequences(const float* rewards, const bool* mask, const int64_t* bounds, int64_t first, int64_t last,
                   double* sums, double* counts) {
  for (int64_t s = first; s < last; ++s) {
    Doubles sum = {};
    double rest = 0.0;
    int64_t counted = 0, n = bounds[s];
    for (; n + kLanes <= bounds[s + 1]; n += kLanes) {
      if (rewards) {
        const Floats x = load(rewards + n);  // selected, not multiplied: a masked reward may be NaN
        sum = sum + widened(mask ? or_zero(float_mask_of(bits_of(mask + n)), x) : x);
      }
      if (mask) counted += count_of(mask + n);
    }
    for (; n < bounds[s + 1]; ++n) {
      if (mask && !mask[n]) continue;
      if (rewards) rest += rewards[n];
      ++counted;
    }
    sums[s] = sum_of_lanes(sum) + rest;
    counts[s] = static_cast<double>(mask ? counted : bounds[s + 1] - bounds[s]);
  }
}

void spread_sequences(const float* per_sequence, const bool* mask, const int64_t* bounds, int64_t first, int64_t last,
                      float* out) {
  for (int64_t s = first; s < last; ++s) {
    const Floats number = floats(per_sequence[s]);
    int64_t n = bounds[s];
    for (; n + kLanes <= bounds[s + 1]; n += kLanes)
      store(out + n, mask ? or_zero(float_mask_of(bits_of(mask + n)), number) : number);
    for (; n < bounds[s + 1]; ++n) out[n] = !mask || mask[n] ? per_sequence[s] : 0.0f;
  }
}

}  // namespace ZS_ISA
}  // namespace zs
